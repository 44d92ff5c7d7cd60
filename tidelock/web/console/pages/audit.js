// Who did what in the organisation.

import { log } from "../log.js";
import { heading } from "../ui.js";

export async function render({ api, signal }) {
  return [
    heading(
      "Audit log",
      "Every change to keys, members, projects, limits and plans, newest first. It can be added to and never edited.",
    ),
    await log((after) => api.get("/v1/organization/audit_logs", { limit: 50, after }, signal)),
  ];
}
