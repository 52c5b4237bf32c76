// Tokens as they are shown. A character may take several tokens: it belongs to the last of them.

export function texts(tokens) {
  const decoder = new TextDecoder("utf-8", { fatal: false, ignoreBOM: true });
  return tokens.map((token) => decoder.decode(new Uint8Array(token.bytes), { stream: true }));
}

/** One token by itself, with what cannot be seen made visible. */
export function nameOf(token) {
  const bytes = new Uint8Array(token.bytes);
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || `token ${token.id}`;
  } catch {
    return [...bytes].map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}

export function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
}

/** The parsed events of a response that streams; throws what the server says went wrong. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
