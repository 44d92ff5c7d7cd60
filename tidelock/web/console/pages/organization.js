// One organisation, for the operator: balance, limits by hand, vouchers, keys, receipts, log.

import { h } from "../dom.js";
import { ago, day, seats } from "../format.js";
import { bars, KINDS, ladder } from "../limits.js";
import { log } from "../log.js";
import { exact, nano, parse, rounded, usd } from "../money.js";
import { BRIEF } from "../receipts.js";
import { amount, badge, card, confirm, dialog, exactAmount, field, heading, later, stat, table } from "../ui.js";

export async function detail({ api, signal, again }, id) {
  const path = `/admin/organizations/${encodeURIComponent(id)}`;
  const o = await api.get(path, {}, signal);
  const { balance, limits, by_hand: hand } = o;
  return [
    h("p.crumb", h("a", { href: "#/organizations" }, "Organisations"), " / ", o.id),
    heading(
      o.name,
      `${o.created_at ? `Since ${day(o.created_at)}. ` : ""}${o.tax_id ? `Tax number ${o.tax_id}, ${o.tax_bps / 100} %.` : ""}`,
      h("button", { onclick: () => voucher(api, path, o, again) }, "Give a voucher"),
      h("button", { onclick: () => byHand(api, path, o, again) }, "Set limits"),
      o.suspended_at === null
        ? h("button.danger", { onclick: () => suspend(api, path, o, again) }, "Suspend")
        : h("button", { onclick: () => resume(api, path, o, again) }, "Lift the suspension"),
    ),
    o.suspended_at !== null &&
      h("p.notice", badge("suspended", "bad"), ` since ${day(o.suspended_at)}: ${o.suspended_for}`),
    h(
      "dl.stats",
      stat(
        "Available",
        h("span.money", { title: exact(balance.available_nano_usd) }, rounded(balance.available_nano_usd)),
      ),
      stat("Cash", amount(balance.cash_nano_usd)),
      stat("Vouchers", amount(balance.voucher_nano_usd)),
      stat("Plan credits", amount(balance.plan_nano_usd)),
      stat("Held", amount(balance.held_nano_usd)),
      nano(balance.owed_nano_usd) > 0n && stat("Owed", amount(balance.owed_nano_usd)),
    ),
    h(
      "div.columns",
      card(
        h(
          "div.bar",
          h("h2", "Limits"),
          Object.values(hand).some((v) => v !== null) ? badge("set by hand", "warn") : h("span.muted", "from the ladder"),
        ),
        bars(limits.now[""]),
      ),
      card(
        "Account",
        h(
          "dl.pairs",
          h("dt", "Tier"),
          h("dd", limits.tier ?? "no ladder"),
          h("dt", "Recharged in all"),
          h("dd", usd(limits.recharged_nano_usd)),
          h("dt", "Plan"),
          h(
            "dd",
            o.subscription
              ? `${o.subscription.plan}, ${seats(o.subscription.quantity)}, until ${day(o.subscription.current_period_end)}`
              : "none",
          ),
          h("dt", "Members"),
          h("dd", o.members.map((m) => h("div", m.email, " ", badge(m.role))).concat(o.members.length ? [] : ["none"])),
          h("dt", "Projects"),
          h(
            "dd",
            o.projects.map((p) => h("div", p.name, p.archived && [" ", badge("archived")])),
          ),
        ),
      ),
    ),
    h("section.card.flush", h("h2", "Ladder"), ladder(limits)),
    h(
      "section.card.flush",
      h("h2", "Keys"),
      table(
        [
          {
            name: "Name",
            class: "clip",
            cell: (k) => [h("strong", k.name || "unnamed"), h("small", h("code", k.redacted_value))],
          },
          { name: "Status", cell: (k) => (k.revoked ? badge("revoked") : badge("active")) },
          {
            name: "May",
            class: "w2",
            cell: (k) =>
              h(
                "span.badges",
                k.scopes.map((s) => badge(s)),
              ),
          },
          { name: "Last used", right: true, cell: (k) => (k.last_used_at ? ago(k.last_used_at) : "never") },
        ],
        o.keys,
        { caption: "Keys", empty: "No keys." },
      ),
    ),
    h(
      "section.card.flush",
      h("h2", "Payments"),
      table(
        [
          { name: "Date", class: "nowrap", cell: (p) => day(p.created_at) },
          { name: "Reference", class: "clip", cell: (p) => h("code", p.id) },
          { name: "Status", cell: (p) => badge(p.status) },
          { name: "Net", right: true, cell: (p) => exactAmount(p.net_nano_usd) },
        ],
        o.payments,
        { caption: "Payments", empty: "No payment was recorded." },
      ),
    ),
    h(
      "section.card.flush",
      h("h2", "Newest receipts"),
      later(
        async () =>
          table(BRIEF, (await api.get(`${path}/receipts`, { limit: 15 }, signal)).data, {
            caption: "Newest receipts",
            empty: "No request yet.",
          }),
        5,
      ),
    ),
    h("h2", "Audit log"),
    later(() => log((after) => api.get("/admin/audit_logs", { organization: id, after, limit: 20 }, signal)), 4),
  ];
}

function voucher(api, path, o, again) {
  dialog(
    `A voucher for ${o.name}`,
    [
      field(
        "Amount in USD",
        h("input", { name: "usd", inputmode: "decimal", required: true, placeholder: "25.00", autocomplete: "off" }),
      ),
      field(
        "Name",
        h("input", { name: "name", required: true, maxlength: 128, placeholder: "welcome-2026", autocomplete: "off" }),
        "The same name is never given twice to anybody.",
      ),
      field(
        "Expires",
        h("input", { name: "expires", type: "date" }),
        "At the beginning of that day, UTC; empty for never.",
      ),
    ],
    {
      action: "Give voucher",
      submit: async (form) => {
        if (!parse(form.get("usd"))) throw new Error("Write an amount such as 25.00");
        const expires = form.get("expires") ? Date.parse(`${form.get("expires")}T00:00:00Z`) / 1000 : null;
        await api.post(`${path}/vouchers`, { usd: form.get("usd").trim(), name: form.get("name"), expires_at: expires });
        again();
      },
    },
  );
}

function suspend(api, path, o, again) {
  dialog(
    `Suspend ${o.name}?`,
    [
      h(
        "p",
        "Within a second all its keys are refused. What runs is finished; batches, renewals and automatic top-ups wait, ",
        "and no credits run out.",
      ),
      field(
        "Reason",
        h("input", { name: "reason", required: true, maxlength: 200, autocomplete: "off" }),
        "One line. The organisation is told.",
      ),
    ],
    {
      action: "Suspend now",
      danger: true,
      submit: async (form) => {
        await api.post(`${path}/suspend`, { reason: form.get("reason") });
        again();
      },
    },
  );
}

function resume(api, path, o, again) {
  confirm(
    `Lift the suspension of ${o.name}?`,
    "Its keys work again within a second. Vouchers and credits last as much longer as the suspension took.",
    "Lift it",
    async () => {
      await api.post(`${path}/resume`, {});
      again();
    },
  );
}

function byHand(api, path, o, again) {
  const number = (name, title) =>
    field(
      title,
      h("input", {
        name,
        inputmode: "numeric",
        pattern: "[0-9]*",
        value: o.by_hand[name] ?? "",
        placeholder: "from the tier",
        autocomplete: "off",
      }),
    );
  dialog(
    `Limits of ${o.name}`,
    [
      number("tier", "Tier, whatever was recharged"),
      KINDS.map(([name, title]) => number(name, title)),
      h("p.hint", "What is left empty comes from the tier. Nought requests a minute lets nothing through."),
    ],
    {
      action: "Set limits",
      submit: async (form) => {
        const value = (name) => (form.get(name).trim() === "" ? null : Number(form.get(name)));
        await api.post(
          `${path}/limits`,
          Object.fromEntries(["tier", ...KINDS.map(([name]) => name)].map((name) => [name, value(name)])),
        );
        again();
      },
    },
  );
}
