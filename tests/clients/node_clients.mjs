// JavaScript programs that people point at an endpoint, each with its own real package.
//
//     node node_clients.mjs URL MODEL [CHECK]...
//
// Prints a line of JSON for each check: its name, and what was wrong. URL has no path.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI } from "@langchain/openai";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, model, ...wanted] = process.argv.slice(2);
const base = `${url}/v1`, asked = "What is the capital of France?", most = 64;
const Lamp = z.object({ state: z.enum(["on", "off"]) });
const lamp = tool({ description: "Switch the lamp.", inputSchema: Lamp, execute: async ({ state }) => `the lamp is ${state}` });
const models = {
  compatible: () => createOpenAICompatible({ name: "phi", baseURL: base, supportsStructuredOutputs: true, includeUsage: true })(model),
  chat: () => createOpenAI({ baseURL: base, apiKey: "none" }).chat(model),
  responses: () => createOpenAI({ baseURL: base, apiKey: "none" }).responses(model),
  anthropic: () => createAnthropic({ baseURL: base, apiKey: "none" })(model),
};
const more = { maxRetries: 0, temperature: 0, maxOutputTokens: most };

const checks = {};
for (const [name, make] of Object.entries(models)) {
  checks[`ai_sdk_${name}_text`] = async () => {
    const said = await generateText({ model: make(), system: "Be brief.", prompt: asked, ...more });
    assert.ok(said.text && said.usage.outputTokens > 0);
    const stream = streamText({ model: make(), system: "Be brief.", prompt: asked, ...more, onError: () => {} });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text, said.text);
    assert.equal((await stream.usage).outputTokens, said.usage.outputTokens);
  };
  checks[`ai_sdk_${name}_tools`] = async () => {
    const options = { model: make(), prompt: "Switch the lamp on.", tools: { lamp }, toolChoice: { type: "tool", toolName: "lamp" }, stopWhen: stepCountIs(1), ...more };
    const said = await generateText(options);
    assert.ok(["the lamp is on", "the lamp is off"].includes(said.toolResults[0].output));
    const stream = streamText({ ...options, onError: () => {} });
    assert.deepEqual((await stream.toolCalls)[0].input, said.toolCalls[0].input);
    const two = await generateText({ ...options, toolChoice: "auto", stopWhen: stepCountIs(2) });
    assert.ok(["stop", "length", "tool-calls"].includes(two.finishReason));
    const messages = [{ role: "user", content: "Switch the lamp on." }, ...said.response.messages, { role: "user", content: "Is it on?" }];
    assert.ok((await generateText({ model: make(), messages, tools: { lamp }, ...more })).finishReason);
  };
  if (name !== "anthropic") checks[`ai_sdk_${name}_object`] = async () => {
    const said = await generateText({ model: make(), prompt: "Switch the lamp on.", output: Output.object({ schema: Lamp }), ...more });
    Lamp.parse(said.output);
  };
}

checks.langchain_js = async () => {
  const chat = new ChatOpenAI({ model, apiKey: "none", configuration: { baseURL: base }, temperature: 0, maxRetries: 0, maxTokens: most });
  const said = await chat.invoke(asked);
  assert.ok(said.content && said.usage_metadata.output_tokens > 0);
  let text = "";
  for await (const piece of await chat.stream(asked)) text += piece.content;
  assert.equal(text, said.content);
  Lamp.parse(await chat.withStructuredOutput(Lamp, { method: "jsonSchema" }).invoke("Switch the lamp on."));
  Lamp.parse(await chat.withStructuredOutput(Lamp, { method: "functionCalling" }).invoke("Switch the lamp on."));
};

checks.openai_js = async () => {
  const client = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0 });
  const messages = [{ role: "user", content: asked }];
  const said = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: most });
  let text = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: most, stream: true })) text += chunk.choices[0]?.delta.content ?? "";
  assert.equal(text, said.choices[0].message.content);
  const answer = await client.responses.create({ model, input: asked, temperature: 0, max_output_tokens: most });
  assert.ok(answer.output_text);
  const events = [];
  for await (const event of await client.responses.create({ model, input: asked, temperature: 0, max_output_tokens: most, stream: true })) events.push(event.type);
  assert.ok(["response.completed", "response.incomplete"].includes(events.at(-1)));
  assert.equal((await client.models.list()).data[0].id, model);
};

for (const [name, run] of Object.entries(checks)) {
  if (wanted.length && !wanted.includes(name)) continue;
  let failure = null;
  try { await run(); } catch (error) { failure = `${error?.stack ?? error}\n${error?.responseBody ?? ""}`; }
  console.log(JSON.stringify({ check: name, failure }));
}
