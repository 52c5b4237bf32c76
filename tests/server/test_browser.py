"""The page in a browser without a screen: typed, streamed, forked, stopped, compared.

It needs Debian's ``chromium-driver`` and the package ``selenium``.
"""

import codecs
import shutil

import httpx
import pytest

from gpt.config import ServeConfig
from gpt.generation.chat import chat_prompt
from tests.generation.test_chat import HELLO
from tests.server.conftest import serving

selenium = pytest.importorskip("selenium", reason="needs the package selenium")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DRIVER, reason="needs chromedriver"),
    pytest.mark.filterwarnings("default"),
]


class Page:
    """The page, as a person uses it."""

    def __init__(self, address, width=1200, greets=True):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.add_argument(f"--window-size={width},900")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.browser.get(address)
        if greets:
            self.until(lambda: self.one("#model").text == "tiny")

    def one(self, selector, number=0):
        return self.all(selector)[number]

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, condition, seconds=30):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, seconds, 0.02).until(lambda _: condition())

    def statuses(self):
        return [each.text for each in self.all(".status")]

    def ended(self):
        self.until(lambda: all("ended" in status for status in self.statuses()))

    def set(self, name, value, pane=0):
        code = "arguments[0].value = arguments[1]"
        self.browser.execute_script(code, self.one(f"[name={name}]", pane), value)

    def type(self, text):
        from selenium.webdriver.common.keys import Keys

        self.one("#prompt").send_keys(text, Keys.CONTROL, Keys.ENTER)

    def click(self, selector, number=0):
        self.browser.execute_script("arguments[0].click()", self.one(selector, number))

    def tokens(self, pane=0):
        code = "return [...arguments[0].querySelectorAll('.made .token')].map(t => t.textContent)"
        return self.browser.execute_script(code, self.one(".pane", pane))

    def complaints(self):
        kinds = ("WARNING", "SEVERE")
        return [e["message"] for e in self.browser.get_log("browser") if e["level"] in kinds]


@pytest.fixture(scope="module")
def place(model):
    with serving(model) as (address, _):
        yield address


@pytest.fixture
def page(place):
    made = Page(place)
    yield made
    assert not made.complaints()
    made.browser.quit()


def test_a_prompt_is_continued_as_the_server_does(page, place):
    page.set("temperature", 0)
    page.set("max_tokens", 12)
    page.type("abc")
    page.ended()
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    [choice] = httpx.post(f"{place}/v1/completions", json=body).json()["choices"]
    content = bytes(byte for token in choice["tokens"] for byte in token["bytes"])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert "".join(page.tokens()) == decoder.decode(content)
    assert page.one(".prompt").text == "abc"


def test_another_token_is_chosen_and_the_text_goes_on(page):
    page.set("max_tokens", 10)
    page.set("seed", 1)
    page.type("abc")
    page.ended()
    before = page.tokens()
    page.click(".made .token", 4)
    page.until(lambda: page.one("#popup").is_displayed())
    choices = [each.get_attribute("class") for each in page.all(".choice")]
    other = choices.index("choice")  # and not the one that was written
    page.click(".choice", other)
    page.until(lambda: len(page.tokens()) == 15)
    page.ended()
    assert page.tokens()[:4] == before[:4]
    assert "chosen" in page.one(".made .token", 4).get_attribute("class")
    page.click(".undo")
    assert page.tokens() == before


ESCAPE_AT_THE_FIRST_TOKEN = """
new MutationObserver((changes, observer) => {
  if (!document.querySelector(".made .token")) return;
  observer.disconnect();
  const key = new KeyboardEvent("keydown", {key: "Escape", bubbles: true});
  document.querySelector("#prompt").dispatchEvent(key);
}).observe(document.body, {childList: true, subtree: true});
"""


def test_the_answer_comes_token_by_token_and_is_stopped_by_escape(page):
    page.set("max_tokens", 250)
    page.browser.execute_script(ESCAPE_AT_THE_FIRST_TOKEN)  # the driver may take longer than a text
    page.type("a")
    page.until(lambda: "stopped" in page.statuses()[0] or "ended" in page.statuses()[0])
    assert page.one("#stop").get_attribute("disabled")
    assert "stopped" in page.statuses()[0]
    assert len(page.tokens()) < 250


def test_a_keyboard_reaches_every_token_and_its_alternatives(page):
    from selenium.webdriver.common.keys import Keys

    page.set("max_tokens", 5)
    page.type("abc")
    page.ended()
    page.browser.execute_script("document.querySelector('.made .token').focus()")
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.browser.switch_to.active_element.get_attribute("data-index") == "1"
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert "choice" in page.browser.switch_to.active_element.get_attribute("class")
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.one("#popup").is_displayed()
    assert page.browser.switch_to.active_element.get_attribute("data-index") == "1"


def test_attention_is_shown_over_the_text(page):
    page.set("max_tokens", 6)
    page.type("abc")
    page.ended()
    page.click(".made .token", 2)
    page.click("#popup button", len(page.all("#popup button")) - 1)
    page.until(lambda: page.one(".attention").is_displayed())
    weights = page.browser.execute_script(
        "return [...document.querySelectorAll('.token')].map(t => t.style.getPropertyValue('--w'))"
    )
    assert len(weights) == 9
    assert all(float(w) > 0 for w in weights[1:6])
    assert [float(w) for w in weights[6:]] == [0, 0, 0]  # nothing looks at what comes later


def test_a_conversation_goes_on(page):
    page.click("#tab-chat")
    page.set("max_tokens", 8)
    page.type("hello")
    page.ended()
    answer = page.one(".message.assistant").text
    page.type("again")
    page.until(lambda: len(page.all(".message.user")) == 2)
    page.ended()
    roles = [each.get_attribute("data-role") for each in page.all(".message")]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert page.one(".message.assistant").text == answer


def sent(page):
    """The bodies of the requests that the page sends from now on."""
    page.browser.execute_script("""
        window.sent = [];
        const ask = window.fetch;
        window.fetch = (place, options) => {
          if (options?.body) window.sent.push(JSON.parse(options.body));
          return ask(place, options);
        };
    """)
    return lambda: page.browser.execute_script("return window.sent")


def test_what_ends_an_answer_is_shown_and_not_said(page, model):
    bodies = sent(page)
    end = next(iter(chat_prompt(model, HELLO)[1]))
    page.click("#tab-chat")
    page.set("max_tokens", 8)
    page.set("min_tokens", 3)
    page.set("logit_bias", f"{end}=100")
    page.type("hello")
    page.ended()
    shown = page.tokens()
    assert shown[-1].startswith("<|")
    assert "unsaid" in page.all(".made .token")[-1].get_attribute("class")
    assert "unsaid" not in page.all(".made .token")[0].get_attribute("class")
    page.type("again")
    page.until(lambda: len(page.all(".message.user")) == 2)
    page.ended()
    history = bodies()[-1]["messages"]
    assert history[1] == {"role": "assistant", "content": "".join(shown[:-1])}


def test_the_attention_of_an_answer_is_shown_over_the_conversation(page):
    page.click("#tab-chat")
    page.set("max_tokens", 4)
    page.type("hello")
    page.ended()
    assert not page.all(".prompt .token")
    page.click(".made .token", 1)
    page.click("#popup button", len(page.all("#popup button")) - 1)
    page.until(lambda: page.all(".prompt .token"))
    assert "hello" in page.one(".prompt").text
    spans = "[...document.querySelectorAll('.prompt .token')]"
    code = f"return {spans}.map(t => t.style.getPropertyValue('--w'))"
    assert any(float(weight) for weight in page.browser.execute_script(code))
    page.click(".close")
    assert [each.text for each in page.all(".message.user")] == ["hello"]
    assert not page.all(".prompt .token")


def test_after_a_stop_another_token_is_chosen_and_only_it_is_read(page, place):
    page.set("max_tokens", 250)
    page.browser.execute_script(ESCAPE_AT_THE_FIRST_TOKEN)
    page.type("A prompt that is long enough to be kept")
    page.until(lambda: not page.one("#stop").get_attribute("disabled") or page.statuses()[0])
    page.until(lambda: page.one("#stop").get_attribute("disabled"))
    before = cached(place)
    page.set("max_tokens", 3)
    page.click(".made .token", 0)
    page.until(lambda: page.one("#popup").is_displayed())
    choices = [each.get_attribute("class") for each in page.all(".choice")]
    page.click(".choice", choices.index("choice"))
    page.ended()
    assert cached(place) - before == len("A prompt that is long enough to be kept")


def cached(place):
    """The tokens that the server did not read again."""
    lines = httpx.get(f"{place}/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith("gpt_cached_tokens_total ")]
    return int(line.split()[1])


def test_two_settings_answer_side_by_side(page):
    page.click("#compare")
    page.until(lambda: len(page.all(".pane")) == 2)
    for pane, n in enumerate((5, 9)):
        page.set("max_tokens", n, pane)
        page.set("temperature", 0, pane)
    page.type("abc")
    page.ended()
    one, two = page.tokens(0), page.tokens(1)
    assert (len(one), len(two)) == (5, 9)
    assert two[:5] == one


def test_two_models_answer_side_by_side(page, place, model):
    config = ServeConfig(model="other", port=0, allow_origin=(place,))
    with serving(model, config=config) as (address, _):
        page.click("#compare")
        page.until(lambda: len(page.all(".pane")) == 2)
        page.set("server", address, 1)
        page.browser.execute_script("arguments[0].onchange()", page.one("[name=server]", 1))
        page.until(lambda: page.one("h2", 1).text == "other")
        for pane in (0, 1):
            page.set("max_tokens", 4, pane)
        page.type("abc")
        page.ended()
        assert len(page.tokens(1)) == 4


def test_a_wrong_setting_is_told(page):
    page.click(".settings summary")
    page.set("top_p", 3)
    page.type("abc")
    page.until(lambda: page.statuses()[0])
    assert "top p" in page.statuses()[0]
    assert not page.tokens()


def test_it_fits_a_phone_and_has_a_dark_mode(place):
    page = Page(place, width=400)
    try:
        page.type("abc")
        page.ended()
        wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.browser.execute_script(wide)
        colour = "return getComputedStyle(document.documentElement).backgroundColor"
        light = page.browser.execute_script(colour)
        page.click("#theme")
        assert page.browser.execute_script(colour) != light
        params = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.browser.refresh()
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", params)
        assert page.browser.execute_script(colour) == "rgb(20, 24, 29)"
    finally:
        page.browser.quit()


def test_a_key_is_typed_on_the_page(model):
    config = ServeConfig(model="tiny", port=0, api_key="secret")
    with serving(model, config=config) as (address, _):
        page = Page(address, greets=False)
        try:
            page.until(lambda: "the API key is missing" in page.statuses()[0])
            page.click("#key-box summary")
            page.one("#key").send_keys("secret\t")
            page.until(lambda: page.one("#model").text == "tiny")
            page.set("max_tokens", 3)
            page.type("abc")
            page.ended()
            assert len(page.tokens()) == 3
        finally:
            page.browser.quit()
