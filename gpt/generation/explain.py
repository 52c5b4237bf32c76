"""Probability, surprisal and alternatives at each token of a text, on a terminal or as a page."""

import codecs
import html
import math
from dataclasses import dataclass
from string import Template

from rich.text import Text

from gpt.data.tokenizer import Tokenizer
from gpt.generation.logprobs import Describer
from gpt.model.gpt import GPT

ALTERNATIVES = 10


@dataclass(frozen=True)
class ExplainedToken:
    """A token of a text, and the model's distribution at its position."""

    text: str
    """The characters that it completes; empty if it only begins one."""
    name: str
    """The token by itself, from :func:`token_text`."""
    logprob: float
    """In nats, given all tokens before it."""
    entropy: float
    """The entropy of the distribution, in nats."""
    alternatives: tuple[tuple[str, float], ...]
    """The likeliest tokens and their probabilities, the likeliest first."""
    is_prompt: bool

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(self.logprob)


def explain(
    model: tuple[GPT, Tokenizer], prompt: list[int], continuation: list[int]
) -> list[ExplainedToken]:
    """Explain each token of ``prompt`` from the second on, and each one of ``continuation``.

    The surprisals sum to the text's loss. Like the evaluation, the model reads a text that is
    longer than the context in windows, and each window begins half a context after the one before.
    """
    network, tokenizer = model
    describer = Describer(network, ALTERNATIVES, tokenizer.vocab_size)
    ids, context = prompt + continuation, network.config.context_length
    explained: list[ExplainedToken] = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(tokenizer.decode_bytes(ids[:1]))
    stride = max(1, context // 2)
    for start in range(0, max(1, len(ids) - 1 - context + stride), stride):
        window = ids[start : start + context + 1]
        details = describer.of_text(window)
        for i in range(len(explained) + 1 - start, len(window)):
            alternatives = tuple(
                (token_text(tokenizer, other), math.exp(logprob))
                for other, logprob in details[i - 1].top
            )
            content, name = tokenizer.decode_bytes([window[i]]), token_text(tokenizer, window[i])
            explained.append(
                ExplainedToken(
                    text=decoder.decode(content, final=len(explained) == len(ids) - 2)
                    if content
                    else name,
                    name=name,
                    logprob=details[i - 1].logprob,
                    entropy=details[i - 1].entropy,
                    alternatives=alternatives,
                    is_prompt=start + i < len(prompt),
                )
            )
    return explained


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself: its text, its bytes if they are not whole characters, or its id."""
    content = tokenizer.decode_bytes([token])
    if not content:
        return "<end of text>" if token == tokenizer.end_of_text else f"<{token}>"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in content)


def as_text(
    tokens: list[ExplainedToken],
    *,
    opening: str = "",
    alternatives: int = 3,
    ascii_only: bool = False,
) -> Text:
    """The text for a terminal, after its ``opening`` (the first token, which nothing predicts).

    The background of each token goes from red (unlikely) to green. Below the text are the least
    likely tokens, each with the likeliest ``alternatives``. ``ascii_only`` shows white space with
    ASCII characters.
    """

    def visibly(name: str) -> str:
        return ascii(name) if ascii_only else visible(name)

    text = Text(opening, style="")
    text.stylize("dim")
    for token in tokens:
        style = "dim" if token.is_prompt else f"black on {_colour(token.probability)}"
        text.append(token.text, style=style)
    text.append("\n\n")
    written = [token for token in tokens if not token.is_prompt]
    surprising = sorted(written, key=lambda token: token.logprob)[:ALTERNATIVES]
    for token in surprising:
        text.append(f"{token.probability:7.2%}  {visibly(token.name):<16} ", style="bold")
        others = (
            f"{visibly(other)} {p:.1%}"
            for other, p in token.alternatives[: alternatives + 1]
            if other != token.name
        )
        text.append("expected: " + ", ".join(list(others)[:alternatives]) + "\n", style="dim")
    text.append(f"\n{_summary(tokens)}\n")
    return text


def as_page(tokens: list[ExplainedToken], *, title: str, opening: str = "") -> str:
    """The same as one HTML page that needs no other file. Hovering over a token, or moving to it
    with Tab, shows its ten likeliest alternatives, its surprisal and the entropy.
    """
    highest = max([-token.logprob for token in tokens] + [1.0])
    return _PAGE.substitute(
        title=html.escape(title),
        summary=html.escape(_summary(tokens)),
        bars="".join(_bar(i, token, highest) for i, token in enumerate(tokens)),
        width=max(1, len(tokens)),
        tokens=f'<span class="p">{_shown(opening)}</span>' + "".join(map(_span, tokens)),
    )


def visible(text: str) -> str:
    """``text`` on one line, with visible white space and control characters."""
    signs = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def _summary(tokens: list[ExplainedToken]) -> str:
    written = [-token.logprob for token in tokens if not token.is_prompt]
    prompt = [-token.logprob for token in tokens if token.is_prompt]
    said = "nothing was written"
    if written:
        mean = sum(written) / len(written)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        said = (
            f"{len(written):,} tokens, {sum(written):.4f} nats in all, {mean:.4f} each, "
            f"perplexity {perplexity:.2f}"
        )
    if prompt:
        said += f"; the prompt's {len(prompt):,} before them {sum(prompt):.4f} nats"
    return said


def _colour(probability: float) -> str:
    fraction = 1 - min(1.0, -math.log(max(probability, 1e-9)) / 7)  # 0.1 % and below is red
    return f"rgb({round(235 - 115 * fraction)},{round(110 + 110 * fraction)},90)"


def _bar(i: int, token: ExplainedToken, highest: float) -> str:
    height = 100 * -token.logprob / highest
    entropy = 100 - 100 * token.entropy / highest
    kind = "p" if token.is_prompt else "w"
    return (
        f'<rect class="{kind}" x="{i + 0.1}" y="{100 - height:.2f}" width=".8" '
        f'height="{height:.2f}"/><rect class="e" x="{i}" y="{entropy:.2f}" width="1" height="1"/>'
    )


def _span(token: ExplainedToken) -> str:
    rows = "".join(
        f"<tr{' class=own' if other == token.name else ''}><td>{html.escape(visible(other))}"
        f'<td><i style="width:{100 * p:.1f}%"></i><td>{p:.2%}'
        for other, p in token.alternatives
    )
    hue = round(130 * (1 - min(1.0, -token.logprob / 7)))
    return (
        f'<span class="t{" p" if token.is_prompt else ""}" tabindex=0 style="--h:{hue}">'
        f"{_shown(token.text) or '<b class=n>‥</b>'}"
        f'<span class="c"><b>{html.escape(visible(token.name))}</b> {token.probability:.2%}'
        f"<br>surprisal <u>{-token.logprob:.6f}</u> nats, entropy {token.entropy:.3f}"
        f"<table>{rows}</table></span></span>"
    )


def _shown(text: str) -> str:
    return html.escape(text).replace("\n", '<b class="n">⏎</b>\n')


_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fbfaf7; --card: #fff; --line: #dcd8cf;
  --soft: #777; --l: 86%; --s: 62% }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e4dc; --paper: #16181c; --card: #22252b;
  --line: #3a3d44; --soft: #999; --l: 27%; --s: 45% } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 54rem; padding: 3rem 1.5rem 16rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0 }
p { color: var(--soft); margin: .2rem 0 1.2rem; font-size: .9rem }
svg { display: block; width: 100%; height: 5rem; margin: 0 0 .3rem; border-bottom: 1px solid
  var(--line) }
.w { fill: #c2653e } .p { fill: var(--line) } .e { fill: #4a7fb5 }
.key { display: flex; gap: 1.4rem; margin-bottom: 1.6rem }
.key i { display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .4em }
main { max-width: 34rem; font: 1.05rem/1.95 ui-serif, Georgia, serif; white-space: pre-wrap;
  overflow-wrap: anywhere }
.t { position: relative; background: hsl(var(--h) var(--s) var(--l)); border-radius: 3px;
  padding: .12em 0; box-shadow: inset 0 0 0 .5px var(--paper); cursor: default; outline: none }
main .p { background: none; color: var(--soft) }
.t:hover, .t:focus { box-shadow: inset 0 0 0 1.5px var(--ink) }
.n { color: var(--soft); font-weight: 400; font-size: .75em }
.c { display: none; position: absolute; left: 0; top: 1.8em; z-index: 1; width: 19rem;
  padding: .8rem 1rem; background: var(--card); color: var(--ink); border: 1px solid var(--line);
  border-radius: 8px; box-shadow: 0 8px 28px #0003; font: .8rem/1.5 system-ui, sans-serif;
  white-space: normal }
.t:hover .c, .t:focus .c { display: block }
.c u { text-decoration: none }
.c b { font-family: ui-monospace, monospace; font-size: .95rem }
table { width: 100%; border-spacing: 0; margin-top: .5rem; font-size: .78rem }
td { padding: .05rem 0; width: 4rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
td:first-child { text-align: left; font-family: ui-monospace, monospace; width: auto;
  max-width: 7rem; overflow: hidden; text-overflow: ellipsis }
td:nth-child(2) { width: 6rem }
td i { display: block; height: .6em; min-width: 1px; background: #4a7fb5; border-radius: 2px }
@media (max-width: 44rem) { .c { position: fixed; top: auto; left: 1rem; right: 1rem; bottom: 1rem;
  width: auto } }
.own td { font-weight: 700 } .own i { background: #c2653e }
</style>
<h1>$title</h1>
<p>$summary</p>
<svg viewBox="0 0 $width 100" preserveAspectRatio="none" aria-hidden="true">$bars</svg>
<p class="key"><span><i style="background:#c2653e"></i>surprisal</span>
<span><i style="background:#4a7fb5"></i>entropy</span>
<span><i style="background:hsl(130 var(--s) var(--l))"></i>likely</span>
<span><i style="background:hsl(0 var(--s) var(--l))"></i>unlikely</span></p>
<main>$tokens</main>
</html>
""")
