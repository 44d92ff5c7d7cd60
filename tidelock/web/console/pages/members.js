// Who belongs to the organisation, and its projects.

import { h } from "../dom.js";
import { day } from "../format.js";
import { badge, confirm, dialog, field, heading, select, table } from "../ui.js";

const ROLES = [
  ["owner", "everything"],
  ["admin", "models, usage, accounts"],
  ["developer", "models and usage"],
  ["billing", "usage and bills"],
  ["viewer", "usage"],
];
const options = ROLES.map(([role, about]) => [role, `${role}: ${about}`]);

export async function render({ api, signal, again }) {
  const [members, projects] = await Promise.all([
    api.get("/v1/organization/users", {}, signal),
    api.get("/v1/organization/projects", { include_archived: true }, signal),
  ]);
  return [
    heading("Members & projects", "Keys end with the membership or the project they belong to."),
    h(
      "section.card.flush",
      h("div.bar", h("h2", "Members"), h("button", { onclick: () => invite(api, again) }, "Add a member")),
      memberTable(api, members.data, again),
    ),
    h(
      "section.card.flush",
      h("div.bar", h("h2", "Projects"), h("button", { onclick: () => named(api, null, again) }, "New project")),
      projectTable(api, projects.data, again),
    ),
  ];
}

function memberTable(api, members, again) {
  const change = (m) =>
    dialog(`Role of ${m.email}`, field("Role", select(options, m.role, null, "Role")), {
      action: "Change role",
      submit: async (form) => {
        await api.post(`/v1/organization/users/${m.id}`, { role: form.get("role") });
        again();
      },
    });
  const remove = (m) =>
    confirm(`Remove ${m.email}?`, "The keys that belong to this member end at once.", "Remove member", async () => {
      await api.delete(`/v1/organization/users/${m.id}`);
      again();
    });
  return table(
    [
      { name: "E-mail", class: "clip", cell: (m) => h("strong", m.email) },
      { name: "Role", cell: (m) => badge(m.role, m.role === "owner" ? "good" : "") },
      { name: "Since", class: "w1 nowrap", cell: (m) => day(m.added_at) },
      {
        name: "",
        right: true,
        cell: (m) => [
          h("button.quiet", { onclick: () => change(m), "aria-label": `Change the role of ${m.email}` }, "Role"),
          h("button.quiet", { onclick: () => remove(m), "aria-label": `Remove ${m.email}` }, "Remove"),
        ],
      },
    ],
    members,
    { caption: "Members", empty: "No members yet; the keys there are belong to programs." },
  );
}

function invite(api, again) {
  dialog(
    "Add a member",
    [
      field("E-mail", h("input", { name: "email", type: "email", required: true, autocomplete: "off" })),
      field("Role", select(options, "developer", null, "Role")),
    ],
    {
      action: "Add member",
      submit: async (form) => {
        await api.post("/v1/organization/users", { email: form.get("email"), role: form.get("role") });
        again();
      },
    },
  );
}

function projectTable(api, projects, again) {
  const archive = (p) =>
    confirm(`Archive ${p.name}?`, "Its keys end at once. Its usage stays in the books.", "Archive project", async () => {
      await api.post(`/v1/organization/projects/${p.id}/archive`, {});
      again();
    });
  return table(
    [
      { name: "Name", class: "clip", cell: (p) => [h("strong", p.name), h("small", h("code", p.id))] },
      { name: "Status", cell: (p) => badge(p.status) },
      { name: "Created", class: "w1 nowrap", cell: (p) => (p.created_at ? day(p.created_at) : "–") },
      {
        name: "",
        right: true,
        cell: (p) =>
          p.status === "active" && [
            h("button.quiet", { onclick: () => named(api, p, again), "aria-label": `Rename ${p.name}` }, "Rename"),
            p.name !== "default" &&
              h("button.quiet", { onclick: () => archive(p), "aria-label": `Archive ${p.name}` }, "Archive"),
          ],
      },
    ],
    projects,
    { caption: "Projects" },
  );
}

function named(api, project, again) {
  dialog(
    project ? `Rename ${project.name}` : "New project",
    field(
      "Name",
      h("input", { name: "name", required: true, maxlength: 128, value: project?.name ?? "", autocomplete: "off" }),
    ),
    {
      action: project ? "Rename" : "Create project",
      submit: async (form) => {
        await api.post(project ? `/v1/organization/projects/${project.id}` : "/v1/organization/projects", {
          name: form.get("name"),
        });
        again();
      },
    },
  );
}
