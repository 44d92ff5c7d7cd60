// The AI SDK: "chat" and "responses" (@ai-sdk/openai), "compatible", "messages" (@ai-sdk/anthropic), "kimi" (moonshotai).
import { createAnthropic } from "@ai-sdk/anthropic";
import { createMoonshotAI } from "@ai-sdk/moonshotai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { z } from "zod";
import { both, check, hi, keys, name, pixel, place, recite, run, saysBoth, tool as asked, url, variant, weather } from "./case.mjs";

const { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } = ai;
const baseURL = `${url}/v1`;

function model(apiKey = keys.good, id = name) {
  if (variant === "chat") return createOpenAI({ apiKey, baseURL }).chat(id);
  if (variant === "responses") return createOpenAI({ apiKey, baseURL }).responses(id);
  if (variant === "compatible") return createOpenAICompatible({ name: "tide", apiKey, baseURL, includeUsage: true, supportsStructuredOutputs: true })(id);
  if (variant === "kimi") return createMoonshotAI({ apiKey, baseURL })(id);
  return createAnthropic({ apiKey, baseURL })(id);
}

const tools = {
  weather: tool({
    description: "The weather of a city", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => weather[city],
  }),
};
const schema = z.object({ city: z.string(), degrees: z.number(), kind: z.enum(["hot", "cold"]) });
const silent = { onError: () => {} };

const cases = {
  async plain() {
    const { text } = await generateText({ model: model(), prompt: hi });
    check(text.includes("Ann"), text);
    return text;
  },
  async usage() {
    await generateText({ model: model(), prompt: "The same words again. ".repeat(20) });
    const { usage } = await generateText({ model: model(), prompt: "The same words again. ".repeat(20) });
    const cached = usage.inputTokenDetails?.cacheReadTokens ?? usage.cachedInputTokens;
    check(usage.inputTokens > 0 && usage.outputTokens > 0 && cached > 0, usage);
    return usage;
  },
  async stream() {
    const result = streamText({ model: model(), prompt: hi, ...silent });
    const kinds = {};
    for await (const part of result.fullStream) kinds[part.type] = (kinds[part.type] ?? 0) + 1;
    check(kinds["text-delta"] > 0 && !kinds.error && (await result.text).includes("Ann"), kinds);
    check((await result.usage).outputTokens > 0, await result.usage);
    return kinds;
  },
  async tools() {
    return saysBoth((await generateText({ model: model(), prompt: both, tools, stopWhen: stepCountIs(4) })).text);
  },
  async tools_streamed() {
    const result = streamText({ model: model(), prompt: both, tools, stopWhen: stepCountIs(4), ...silent });
    await result.consumeStream();
    return saysBoth(await result.text);
  },
  async unstored() {
    const providerOptions = { openai: { store: false, include: ["reasoning.encrypted_content"], reasoningEffort: "low" } };
    return saysBoth((await generateText({ model: model(), prompt: both, tools, stopWhen: stepCountIs(4), providerOptions })).text);
  },
  async history() {
    const first = await generateText({ model: model(), prompt: asked, tools, stopWhen: stepCountIs(4) });
    const messages = [{ role: "user", content: asked }, ...first.response.messages, { role: "user", content: hi }];
    const { text } = await generateText({ model: model(), messages, tools });
    check(text.includes("Ann"), text);
    return text;
  },
  async forced() {
    const { toolCalls } = await generateText({ model: model(), prompt: "Hm.", tools, toolChoice: { type: "tool", toolName: "weather" } });
    check(toolCalls.length > 0 && typeof toolCalls[0].input.city === "string", toolCalls);
    return toolCalls.length;
  },
  async required() {
    const { toolCalls } = await generateText({ model: model(), prompt: "Hm.", tools, toolChoice: "required" });
    check(toolCalls.length > 0, toolCalls);
    return toolCalls.length;
  },
  async structured() {
    return (await generateText({ model: model(), prompt: place, output: Output.object({ schema }) })).output;
  },
  async object() {
    return (await generateObject({ model: model(), prompt: place, schema })).object;
  },
  async object_streamed() {
    const result = streamObject({ model: model(), prompt: place, schema, ...silent });
    let n = 0;
    for await (const _ of result.partialObjectStream) n++;
    await result.object;
    return n;
  },
  async picture() {
    const content = [{ type: "text", text: hi }, { type: "image", image: Buffer.from(pixel, "base64"), mediaType: "image/png" }];
    return (await generateText({ model: model(), messages: [{ role: "user", content }] })).text;
  },
  async reasoning() {
    const providerOptions = { openai: { reasoningSummary: "auto" }, anthropic: { thinking: { type: "enabled", budgetTokens: 2000 } } };
    const { reasoningText } = await generateText({ model: model(), prompt: hi, providerOptions });
    check(variant === "chat" || reasoningText, reasoningText ?? null); // @ai-sdk/openai reads no thoughts of Chat Completions
    return reasoningText ?? "-";
  },
};
if (variant !== "responses") delete cases.unstored;
// the provider for Kimi asks for some JSON object and says nothing of the schema
if (variant === "kimi") for (const title of ["structured", "object", "object_streamed"]) delete cases[title];

await run(cases, async (key, id, streamed) => {
  if (!streamed) return generateText({ model: model(key, id), prompt: recite });
  let failure;
  const result = streamText({ model: model(key, id), prompt: recite, onError: ({ error }) => { failure = error; } });
  await result.consumeStream({ onError: (error) => { failure ??= error; } });
  if (failure) throw failure instanceof Error ? failure : new Error(JSON.stringify(failure));
});
