// The page: one prompt or conversation for one or two panes, and the window of alternatives.

import { Pane } from "./pane.js";
import { nameOf, percent } from "./tokens.js";

const get = (id) => document.getElementById(id);
let mode = "prompt";

const popup = {
  pinned: false,
  show(pane, index, span, pinned) {
    const token = pane.tokens[index];
    this.leave(true);
    Object.assign(this, { pane, index, span, pinned });
    span.classList.add("current");
    const box = get("popup");
    const about = document.createElement("p");
    about.textContent = token.logprob === undefined ? nameOf(token) : `${nameOf(token)} had ${percent(token.logprob)}`;
    const all = (token.top ?? []).some((one) => one.id === token.id) ? token.top : [token, ...(token.top ?? [])];
    const choices = all.map((one) => {
      const button = document.createElement("button");
      button.className = one.id === token.id ? "choice own" : "choice";
      button.style.setProperty("--p", Math.exp(one.logprob ?? 0).toFixed(3));
      const name = Object.assign(document.createElement("span"), { textContent: nameOf(one) });
      const share = Object.assign(document.createElement("span"), { textContent: percent(one.logprob ?? 0) });
      button.append(name, share);
      button.onclick = () => {
        this.close();
        pane.fork(index, one);
      };
      return button;
    });
    const look = Object.assign(document.createElement("button"), { textContent: "Attention of this token" });
    look.onclick = () => {
      this.close();
      pane.attend(index);
    };
    box.replaceChildren(about, ...choices, look);
    box.hidden = false;
    const at = span.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8);
    let top = at.bottom + 4;
    if (top + box.offsetHeight > innerHeight && at.top > box.offsetHeight) top = at.top - box.offsetHeight - 4;
    box.style.left = `${Math.max(4, left) + scrollX}px`;
    box.style.top = `${top + scrollY}px`;
    if (pinned) (box.querySelector(".own") ?? box.querySelector("button")).focus();
  },
  /** The pointer has left a token: what was not clicked goes. */
  leave(always = false) {
    if (this.pinned && !always) return;
    if (!always && get("popup").matches(":hover")) return;
    this.span?.classList.remove("current");
    get("popup").hidden = true;
    this.pinned = false;
  },
  close() {
    const span = this.span;
    this.leave(true);
    span?.focus();
  },
};

const shared = { popup, key: () => get("key").value || sessionStorage.getItem("key") || "", changed: refresh };
const panes = [new Pane(get("panes"), "model", shared)];

function refresh() {
  const busy = panes.some((pane) => pane.running);
  get("stop").disabled = !busy;
  get("model").textContent = panes[0]?.model?.id ?? "";
  const chats = panes[0]?.model?.has_chat ?? false;
  get("tab-chat").disabled = !chats;
  get("tab-chat").title = chats ? "" : "This model has no chat template";
}

function choose(name) {
  mode = name;
  for (const each of ["prompt", "chat"]) get(`tab-${each}`).setAttribute("aria-selected", each === name);
  get("go").firstChild.textContent = name === "chat" ? "Send " : "Continue ";
  get("prompt").placeholder = name === "chat" ? "A message to the model" : "Once upon a time";
  panes.forEach((pane) => pane.clear());
  get("prompt").focus();
}

function go() {
  popup.leave(true);
  const text = get("prompt").value;
  const isNarrow = matchMedia("(max-width: 45rem)").matches;
  for (const pane of panes) {
    if (isNarrow) pane.find(".settings").open = false; // else the text is far below
    if (mode === "prompt") {
      pane.run({ prompt: text });
      continue;
    }
    if (!text.trim()) continue;
    const before = pane.messages.slice();
    if (pane.tokens.length) before.push({ role: "assistant", content: pane.said });
    pane.run({ messages: [...before, { role: "user", content: text }] });
  }
  if (mode === "chat") get("prompt").value = "";
}

get("input").onsubmit = (event) => {
  event.preventDefault();
  go();
};
get("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    go();
  }
};
get("stop").onclick = () => panes.forEach((pane) => pane.stop());
get("clear").onclick = () => panes.forEach((pane) => pane.clear());
get("tab-prompt").onclick = () => choose("prompt");
get("tab-chat").onclick = () => choose("chat");
get("shade").onchange = () => get("panes").classList.toggle("shaded", get("shade").checked);
get("compare").onchange = async () => {
  if (get("compare").checked) {
    const pane = new Pane(get("panes"), "model", shared);
    panes.push(pane);
    pane.find(".settings").open = panes[0].find(".settings").open = true;
    await pane.greet();
  } else {
    const pane = panes.pop();
    pane.stop();
    pane.element.remove();
  }
};
get("theme").onclick = () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
get("key").onchange = () => {
  sessionStorage.setItem("key", get("key").value);
  panes.forEach((pane) => pane.greet());
};
get("popup").onmouseleave = () => popup.leave();
get("popup").onkeydown = (event) => {
  const buttons = [...get("popup").querySelectorAll("button")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    const at = buttons.indexOf(document.activeElement) + step;
    buttons[(at + buttons.length) % buttons.length].focus();
    event.preventDefault();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!get("popup").hidden) popup.close();
  else panes.forEach((pane) => pane.stop());
});
document.addEventListener("click", (event) => {
  if (!get("popup").hidden && !get("popup").contains(event.target) && !event.target.closest(".made .token")) popup.leave(true);
});

get("panes").classList.add("shaded");
panes[0].greet();
get("prompt").focus();
