"use strict";
const at = id => document.getElementById(id);
let model = "", running = null;

function headers() {
  const key = at("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: "Bearer " + key } : {}) };
}

async function load() {
  const health = await fetch("/health").then(answer => answer.json());
  model = health.model;
  at("model").textContent = model;
  const models = await fetch("/v1/models");
  at("key-label").hidden = models.status !== 401;
}

async function generate(event) {
  event.preventDefault();
  if (running) return;
  const prompt = at("prompt").value;
  const shown = document.createElement("b");
  shown.textContent = prompt;
  at("text").replaceChildren(shown);
  at("status").textContent = "";
  running = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  const began = performance.now();
  let tokens = 0, reason = "";
  try {
    const answer = await fetch("/v1/completions", {
      method: "POST", headers: headers(), signal: running.signal,
      body: JSON.stringify({
        model, prompt, stream: true, stream_options: { include_usage: true },
        max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value),
      }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        if (chunk.usage) tokens = chunk.usage.completion_tokens;
        for (const choice of chunk.choices) {
          at("text").append(choice.text);
          reason = choice.finish_reason || reason;
        }
      }
    }
    const seconds = (performance.now() - began) / 1000;
    at("status").textContent =
      `${tokens} tokens in ${seconds.toFixed(2)} s, ${(tokens / seconds).toFixed(1)} tokens/s (${reason})`;
  } catch (error) {
    at("status").textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").disabled = true;
  }
}

at("form").addEventListener("submit", generate);
at("stop").addEventListener("click", () => running && running.abort());
load().catch(error => { at("status").textContent = String(error); });
