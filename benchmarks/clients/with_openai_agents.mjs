// OpenAI's agents in JavaScript, "chat" and "responses".
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run as start, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";
import { both, check, hi, keys, name, place, recite, run, saysBoth, tool as asked, url, variant, weather } from "./case.mjs";

setTracingDisabled(true);
const client = (apiKey) => new OpenAI({ apiKey, baseURL: `${url}/v1` });
const model = (key = keys.good, id = name) => new (variant === "responses" ? OpenAIResponsesModel : OpenAIChatCompletionsModel)(client(key), id);
const agent = (more = {}) => new Agent({ name: "a", instructions: "Be kind.", model: model(), ...more });
const tools = [tool({ name: "weather", description: "The weather of a city", parameters: z.object({ city: z.string() }), execute: async ({ city }) => weather[city] })];

const cases = {
  async plain() {
    const { finalOutput } = await start(agent(), hi);
    check(finalOutput.includes("Ann"), finalOutput);
    return finalOutput;
  },
  async stream() {
    const result = await start(agent(), hi, { stream: true });
    let n = 0;
    for await (const _ of result) n++;
    check(n > 0 && result.finalOutput.includes("Ann"), result.finalOutput);
    return n;
  },
  tools: async () => saysBoth((await start(agent({ tools }), both)).finalOutput),
  async tools_streamed() {
    const result = await start(agent({ tools }), both, { stream: true });
    for await (const _ of result);
    return saysBoth(result.finalOutput);
  },
  forced: async () => (await start(agent({ tools, modelSettings: { toolChoice: "weather" } }), asked)).finalOutput,
  structured: async () => (await start(agent({ outputType: z.object({ city: z.string(), degrees: z.number() }) }), place)).finalOutput,
  async history() {
    const first = await start(agent({ tools }), asked);
    const { finalOutput } = await start(agent({ tools }), [...first.history, { role: "user", content: hi }]);
    check(finalOutput.includes("Ann"), finalOutput);
    return finalOutput;
  },
  async unstored() {
    const modelSettings = { store: false, providerData: { include: ["reasoning.encrypted_content"] } };
    return saysBoth((await start(agent({ tools, modelSettings }), both)).finalOutput);
  },
};

await run(cases, async (key, id, streamed) => {
  const asking = agent({ model: model(key, id), modelSettings: { maxTokens: 4000 } });
  if (!streamed) return start(asking, recite);
  const result = await start(asking, recite, { stream: true });
  for await (const _ of result);
  await result.completed;
}, variant === "responses" ? { cut: "response.failed" } : {});
