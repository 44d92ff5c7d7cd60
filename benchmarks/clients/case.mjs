// The frame of a client's file in JavaScript; see case.py, which it follows.
export const url = process.env.TIDE_URL, keys = JSON.parse(process.env.TIDE_KEYS), name = "tide-nano";
export const variant = process.argv[2];
export const hi = "Say hi to 'Ann'.", tool = "Use the weather tool for 'Paris'.";
export const both = "Use the weather tool for 'Paris' and for 'Rome' in parallel.";
export const weather = { Paris: "sun over Paris", Rome: "rain over Rome" };
export const recite = "Recite the poem.", place = "Fill in the JSON of the place.";
export const pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC";
const fails = {
  key: ["sk-nobody", name, "API key"], model: [keys.strict, "no-such-model", "no-such-model"],
  banned: [keys.banned, name, "suspended"], empty: [keys.empty, name, "insufficient balance"],
  cut: [keys.poor, name, "insufficient balance"],
};

export function check(holds, found) {
  if (!holds) throw new Error(`unexpected: ${typeof found === "string" ? found : JSON.stringify(found)}`);
}

export function saysBoth(text) {
  check(Object.values(weather).every((words) => text.includes(words)), text);
  return text;
}

// `lost`: of a refusal by its kind, the words that remain of ours where the library keeps no more.
export async function run(cases, ask, lost = {}) {
  for (const [kind, [key, model, ours]] of Object.entries(fails)) {
    const words = lost[kind] ?? ours;
    cases[`refused_${kind}`] = async () => {
      try {
        await ask(key, model, kind === "cut");
      } catch (error) {
        const told = `${error?.name}: ${error?.message ?? ""} ${error?.responseBody ?? ""} ${JSON.stringify(error)}`;
        if (told.includes(words)) return told.slice(0, 300);
        throw new Error(`"${words}" is lost: ${told}`);
      }
      throw new Error("nothing was raised");
    };
  }
  const wanted = process.argv.slice(3);
  for (const [title, body] of Object.entries(cases)) {
    if (wanted.length && !wanted.includes(title)) continue;
    let outcome;
    try {
      const said = await body();
      outcome = { case: title, ok: true, said: typeof said === "string" ? said : JSON.stringify(said) ?? "" };
    } catch (error) {
      outcome = { case: title, ok: false, said: `${error?.name}: ${error?.message ?? JSON.stringify(error)} ${error?.responseBody ?? ""}`.slice(0, 700) };
    }
    console.log("\n" + JSON.stringify(outcome));
  }
  process.exit(0);
}
