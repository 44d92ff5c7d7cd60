// Keys: made, shown once, revoked. A key without the scope admin sees what it may itself.

import { copy, h, icon } from "../dom.js";
import { ago, day } from "../format.js";
import { badge, card, confirm, dialog, field, heading, select, table } from "../ui.js";

const SCOPES = [
  ["model", "ask the model"],
  ["files", "files and batches"],
  ["usage", "read usage and receipts"],
  ["billing", "read invoices and plans"],
  ["admin", "manage keys, members, projects"],
];
const CONSENT = [
  ["no", "Never"],
  ["ask", "Only requests that say so"],
  ["yes", "Unless a request says no"],
];

export async function render({ api, me, signal, again }) {
  if (!me.api_key.scopes.includes("admin")) return own(me.api_key);
  const [projects, members] = await Promise.all([
    api.get("/v1/organization/projects", {}, signal),
    api.get("/v1/organization/users", {}, signal),
  ]);
  const lists = await Promise.all(
    projects.data.map((p) => api.get(`/v1/organization/projects/${p.id}/api_keys`, {}, signal)),
  );
  const keys = lists
    .flatMap((list, n) => list.data.map((k) => ({ ...k, project: projects.data[n].name })))
    .sort((a, b) => (b.last_used_at ?? b.created_at) - (a.last_used_at ?? a.created_at));
  const names = new Map(members.data.map((m) => [m.id, m.email]));
  const create = h(
    "button.primary",
    { onclick: () => creation(api, me, projects.data, members.data, again) },
    "Create a key",
  );
  const columns = [
    {
      name: "Name",
      class: "clip",
      cell: (k) => [h("strong", k.name || "unnamed"), h("small", h("code", k.redacted_value))],
    },
    {
      name: "Project",
      class: "clip w1",
      cell: (k) => [
        k.project,
        h("small", k.owner.user ? (names.get(k.owner.user.id) ?? k.owner.user.id) : "a program's"),
      ],
    },
    {
      name: "May",
      class: "w2",
      cell: (k) =>
        h(
          "span.badges",
          k.scopes.map((scope) => badge(scope, scope === "admin" ? "warn" : "")),
        ),
    },
    { name: "Only", class: "w3", cell: restrictions },
    {
      name: "Training",
      class: "w2",
      cell: (k) => badge(...(k.training_consent ? ["yes", "good"] : k.may_grant ? ["by request", ""] : ["no", ""])),
    },
    {
      name: "Last used",
      class: "nowrap",
      cell: (k) =>
        k.last_used_at ? h("span", { title: day(k.last_used_at) }, ago(k.last_used_at)) : h("span.muted", "never"),
    },
    { name: "Created", class: "w3 nowrap", cell: (k) => day(k.created_at) },
    {
      name: "",
      right: true,
      cell: (k) =>
        k.id === me.api_key.id
          ? badge("this one")
          : h(
              "button.quiet",
              { "aria-label": `Revoke ${k.name || k.redacted_value}`, onclick: () => revocation(api, k, again) },
              "Revoke",
            ),
    },
  ];
  return [
    heading("API keys", "A key is shown once, when it is made. Revoking one ends it everywhere within a second.", create),
    h("section.card.flush", table(columns, keys, { caption: "API keys", empty: "No key yet." })),
  ];
}

function restrictions(k) {
  const said = [
    k.models.length && `models ${k.models.join(", ")}`,
    k.addresses.length && `from ${k.addresses.join(", ")}`,
    k.profile && `profile ${k.profile}`,
  ].filter(Boolean);
  return said.length ? said.map((text) => h("small", text)) : h("span.muted", "–");
}

function own(key) {
  return [
    heading("API keys", "This key may not manage keys; that needs the scope admin. This is what it may itself."),
    card(
      key.name || "This key",
      h(
        "dl.pairs.left",
        h("dt", "Key"),
        h("dd", h("code", key.redacted_value)),
        h("dt", "May"),
        h(
          "dd",
          h(
            "span.badges",
            key.scopes.map((scope) => badge(scope)),
          ),
        ),
        h("dt", "Models"),
        h("dd", key.models.join(", ") || "all"),
        h("dt", "Addresses"),
        h("dd", key.addresses.join(", ") || "any"),
        h("dt", "Training consent"),
        h(
          "dd",
          key.training_consent ? "unless a request says no" : key.may_grant ? "only requests that say so" : "never",
        ),
      ),
    ),
  ];
}

function creation(api, me, projects, members, again) {
  const live = projects.filter((p) => p.status === "active");
  const scopes = h(
    "fieldset",
    h("legend", "May"),
    h(
      "div.checks",
      SCOPES.map(([scope, about]) =>
        h(
          "label.check",
          { title: about },
          h("input", {
            type: "checkbox",
            name: "scopes",
            value: scope,
            checked: ["model", "files", "usage"].includes(scope),
            disabled: !me.api_key.scopes.includes(scope),
          }),
          scope,
        ),
      ),
    ),
  );
  const box = dialog(
    "Create a key",
    [
      field("Name", h("input", { name: "name", maxlength: 100, placeholder: "production", autocomplete: "off" })),
      field(
        "Project",
        select(
          live.map((p) => [p.id, p.name]),
          live[0]?.id,
          null,
          "Project",
        ),
      ),
      members.length > 0 &&
        field(
          "Belongs to",
          select([["", "a program"], ...members.map((m) => [m.id, m.email])], "", null, "Member"),
          "A member's key never may more than the member, and ends with the membership.",
        ),
      scopes,
      field(
        "Only these models",
        h("input", { name: "models", placeholder: "all", autocomplete: "off" }),
        "Names with spaces between them.",
      ),
      field(
        "Only from these addresses",
        h("input", { name: "addresses", placeholder: "anywhere", autocomplete: "off" }),
        "IP addresses or networks such as 10.0.0.0/8.",
      ),
      field("May its traffic be trained on?", select(CONSENT, "no", null, "Consent")),
    ],
    {
      action: "Create key",
      submit: async (form) => {
        const words = (name) =>
          String(form.get(name))
            .split(/[\s,]+/)
            .filter(Boolean);
        const made = await api.post(`/v1/organization/projects/${form.get("project")}/api_keys`, {
          name: String(form.get("name")).trim(),
          member: form.get("member") ?? "",
          scopes: form.getAll("scopes"),
          models: words("models"),
          addresses: words("addresses"),
          training_consent: form.get("consent") === "yes",
          may_grant: form.get("consent") === "ask",
        });
        box.addEventListener("close", again);
        return once(made);
      },
    },
  );
}

function once(made) {
  const button = h("button", { type: "button", onclick: () => copy(made.value, button) }, icon("copy"), "Copy");
  return h(
    "div",
    { style: { display: "grid", gap: "12px" } },
    h("p", `${made.name || "The key"} is made. Copy it now: it is not stored, and nobody can show it again.`),
    h("div.secret", h("code", made.value), button),
  );
}

const revocation = (api, k, again) =>
  confirm(
    `Revoke ${k.name || k.redacted_value}?`,
    "Whatever uses this key stops working within a second. This cannot be taken back.",
    "Revoke key",
    async () => {
      await api.delete(`/v1/organization/projects/${k.project_id}/api_keys/${k.id}`);
      again();
    },
  );
