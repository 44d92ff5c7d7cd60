"""The table of metrics: name, definition in words, SQL, unit. The SQL stands behind `relations.with_clause` and gives
rows (month, part, value); `part` is '' for a number that has none. Values are integers in the named unit; a zero may be
left out."""

from __future__ import annotations

from tidelock.service.analytics.metric import COUNT, SECONDS, USD, Metric
from tidelock.service.analytics.selling import SELLING

# ---- who pays ------------------------------------------------------------------------------------------------------

PAYERS = [
    Metric(
        "payers.usage",
        "Customers with at least one settled debit in the month that was paid in money at least in part, not by vouchers "
        "or plan credits alone.",
        "SELECT month, '', COUNT(*) FROM payers GROUP BY month",
        COUNT,
    ),
    Metric(
        "payers.usage_or_plan",
        "Customers that count under payers.usage, or had a paid plan in force at any moment of the month.",
        """SELECT month, '', COUNT(*) FROM (
    SELECT month, customer FROM payers
    UNION
    SELECT m.month, t.customer FROM terms t JOIN months m ON t.starts < m.ends AND t.ends > m.starts
) AS paying GROUP BY month""",
        COUNT,
    ),
    Metric(
        "payers.cash",
        "Customers from whom money came in during the month: a top-up booked, or a paid plan term begun.",
        """SELECT month, '', COUNT(*) FROM (
    SELECT m.month, t.customer FROM transactions t JOIN months m ON t.created >= m.starts AND t.created < m.ends
    WHERE t.kind = 'topup'
    UNION
    SELECT m.month, t.customer FROM terms t JOIN months m ON t.starts >= m.starts AND t.starts < m.ends
) AS paying GROUP BY month""",
        COUNT,
    ),
    Metric(
        "payers.moves",
        "payers.usage of the month by whether they had never paid before (new), paid in the month before (kept) or only "
        "earlier (returned); and those who paid in the month before and did not now (lost). Prepaid customers do not cancel: "
        "a month without paid usage is what churn is.",
        """SELECT month, part, COUNT(*) FROM (
    SELECT p.month, CASE WHEN c.n = p.n THEN 'new' WHEN b.n IS NULL THEN 'returned' ELSE 'kept' END AS part
    FROM payers p JOIN cohorts c ON c.customer = p.customer
    LEFT JOIN payers b ON b.customer = p.customer AND b.n = p.n - 1
    UNION ALL
    SELECT m.month, 'lost' FROM payers p JOIN months m ON m.n = p.n + 1
    LEFT JOIN payers a ON a.customer = p.customer AND a.n = m.n WHERE a.n IS NULL
) AS moves GROUP BY month, part""",
        COUNT,
    ),
    Metric(
        "payers.by_region",
        "payers.usage by billing entity and currency (not by IP address).",
        "SELECT month, region, payers FROM region_months",
        COUNT,
    ),
    Metric(
        "cohorts.payers",
        "Of the customers whose first paid month is the part, how many count under payers.usage in the month.",
        """SELECT p.month, c.month, COUNT(*) FROM payers p JOIN cohorts c ON c.customer = p.customer
GROUP BY p.month, c.month""",
        COUNT,
    ),
    Metric(
        "first_call.seconds",
        "Median (the lower of two) time from the creation of the account to its first settled debit paid in money, over "
        "the customers for whom that came in the month.",
        """SELECT month, '', seconds FROM (
    SELECT m.month, f.first_call - c.created AS seconds, COUNT(*) OVER (PARTITION BY m.month) AS many,
           ROW_NUMBER() OVER (PARTITION BY m.month ORDER BY f.first_call - c.created) AS place
    FROM (SELECT customer, MIN(created) AS first_call FROM charges WHERE paid_nano > 0 GROUP BY customer) AS f
    JOIN customers c ON c.customer = f.customer
    JOIN months m ON f.first_call >= m.starts AND f.first_call < m.ends
    WHERE c.created > 0
) AS ranked WHERE place = (many + 1) / 2""",
        SECONDS,
    ),
]

# ---- revenue and cash ----------------------------------------------------------------------------------------------

REVENUE = [
    Metric(
        "revenue.usage",
        "Usage revenue, recognised when a request is settled: settled debits less what vouchers and plan credits covered, "
        "with re-rating in the month it was booked. Top-ups are not revenue.",
        "SELECT month, '', CAST(SUM(paid_nano) AS BIGINT) FROM customer_months GROUP BY month",
        USD,
    ),
    Metric(
        "credits.used",
        "Usage at list price that vouchers and plan credits covered: contra-revenue.",
        "SELECT month, '', CAST(SUM(credit_nano) AS BIGINT) FROM charge_months GROUP BY month",
        USD,
    ),
    Metric(
        "credits.granted",
        "Vouchers and plan credits given in the month.",
        """SELECT month, account, CAST(SUM(nano) AS BIGINT) FROM ledger_months
WHERE booked IN ('voucher_grant', 'plan_grant') AND account IN ('voucher', 'plan') GROUP BY month, account""",
        USD,
    ),
    Metric(
        "breakage",
        "Vouchers and plan credits that expired unused in the month, by kind.",
        """SELECT month, account, CAST(-SUM(nano) AS BIGINT) FROM ledger_months
WHERE booked = 'expire' AND account IN ('voucher', 'plan') GROUP BY month, account""",
        USD,
    ),
    Metric(
        "cash",
        "Prepaid money that came in (top-ups) and went back (refunds) in the month.",
        """SELECT month, 'in', CAST(-SUM(nano) AS BIGINT) FROM ledger_months WHERE account = 'outside' GROUP BY month
UNION ALL
SELECT month, 'refunded', CAST(SUM(nano) AS BIGINT) FROM ledger_months WHERE account = 'refunds' GROUP BY month""",
        USD,
    ),
    Metric(
        "deferred",
        "Prepaid money not used yet at the end of the month, a liability: all that ever came in, plus what customers owe, "
        "less refunds, plan fees and all usage revenue so far. Money held by running requests is still in it.",
        """SELECT m.month, '', CAST(SUM(d.nano) AS BIGINT) FROM months m JOIN (
    SELECT n, -nano AS nano FROM ledger_months WHERE account IN ('outside', 'receivable', 'refunds', 'fees')
    UNION ALL
    SELECT n, -paid_nano FROM customer_months
) AS d ON d.n <= m.n GROUP BY m.month""",
        USD,
    ),
    Metric(
        "receivable",
        "What customers owe at the end of the month (re-rating that their pockets did not cover).",
        """SELECT m.month, '', CAST(-SUM(l.nano) AS BIGINT) FROM months m JOIN ledger_months l ON l.n <= m.n
WHERE l.account = 'receivable' GROUP BY m.month""",
        USD,
    ),
    Metric(
        "revenue.by_region",
        "revenue.usage by billing entity and currency, in USD as settled (the rate at the transaction).",
        "SELECT month, region, paid_nano FROM region_months",
        USD,
    ),
    Metric(
        "revenue.constant_currency",
        "revenue.by_region with each month's amounts in the billing currency turned into USD at the base month's rate "
        "instead of their own. A month or currency without a stored rate stays as settled.",
        """SELECT r.month, r.region, CASE WHEN own.nano_usd IS NULL OR fixed.nano_usd IS NULL THEN r.paid_nano
    ELSE r.paid_nano / own.nano_usd * fixed.nano_usd + r.paid_nano % own.nano_usd * fixed.nano_usd / own.nano_usd END
FROM region_months r CROSS JOIN base
LEFT JOIN fx_rates own ON own.currency = r.currency AND own.month = r.month
LEFT JOIN fx_rates fixed ON fixed.currency = r.currency AND fixed.month = base.month""",
        USD,
    ),
    Metric(
        "cohorts.revenue",
        "revenue.usage of the month by the customers' first paid month.",
        """SELECT r.month, c.month, CAST(SUM(r.paid_nano) AS BIGINT)
FROM customer_months r JOIN cohorts c ON c.customer = r.customer GROUP BY r.month, c.month""",
        USD,
    ),
    Metric(
        "concentration",
        "revenue.usage of the month's 1, 10 and 100 largest customers, and of all.",
        """SELECT month, part, CAST(SUM(paid_nano) AS BIGINT) FROM (
    SELECT month, paid_nano, ROW_NUMBER() OVER (PARTITION BY month ORDER BY paid_nano DESC) AS place FROM customer_months
) AS ranked JOIN tops ON place <= most GROUP BY month, part""",
        USD,
    ),
]


def _retention(lag: int, words: str) -> Metric:
    return Metric(
        f"retention.{lag}m",
        f"Of the payers of {words} before: their revenue then (base), what they pay now (net), and what they pay now "
        "counting no more than then (kept). NRR = net / base, GRR = kept / base.",
        f"""SELECT m.month, s.part, CAST(SUM(CASE
    WHEN s.part = 'base' THEN p.paid_nano
    WHEN s.part = 'net' OR COALESCE(r.paid_nano, 0) < p.paid_nano THEN COALESCE(r.paid_nano, 0)
    ELSE p.paid_nano END) AS BIGINT)
FROM payers p JOIN months m ON m.n = p.n + {lag}
LEFT JOIN customer_months r ON r.customer = p.customer AND r.n = m.n
CROSS JOIN sides s GROUP BY m.month, s.part""",
        USD,
    )


# ---- plans ---------------------------------------------------------------------------------------------------------

PLANS = [
    Metric(
        "mrr",
        "Monthly recurring revenue of paid plans in force at the last instant of the month, prices divided by the months "
        "they cover; usage is never in it. start + new + reactivation + expansion - contraction - churn = end. "
        "New: the customer never had any; reactivation: had some before, but not at the start.",
        """SELECT v.month, s.part, CAST(SUM(CASE
    WHEN s.part = 'start' THEN v.start_nano
    WHEN s.part = 'end' THEN v.end_nano
    WHEN s.part = 'new' AND v.is_first = 1 THEN v.end_nano
    WHEN s.part = 'reactivation' AND v.is_first = 0 AND v.start_nano = 0 THEN v.end_nano
    WHEN s.part = 'expansion' AND v.start_nano > 0 AND v.end_nano > v.start_nano THEN v.end_nano - v.start_nano
    WHEN s.part = 'contraction' AND v.end_nano > 0 AND v.end_nano < v.start_nano THEN v.start_nano - v.end_nano
    WHEN s.part = 'churn' AND v.end_nano = 0 THEN v.start_nano
    ELSE 0 END) AS BIGINT)
FROM mrr_moves v CROSS JOIN steps s GROUP BY v.month, s.part""",
        USD,
    ),
    Metric(
        "plans.fees",
        "Plan fees taken from prepaid money in the month, by plan: what was billed, for the whole of the terms that began.",
        """SELECT m.month, t.detail, CAST(SUM(e.nano_usd) AS BIGINT)
FROM transactions t JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind = 'fees'
JOIN months m ON t.created >= m.starts AND t.created < m.ends WHERE t.kind = 'plan_fee' GROUP BY m.month, t.detail""",
        USD,
    ),
    Metric(
        "plans.recognised",
        "Plan fees earned in the month, by plan: each term's price evenly by the second over the term as it was sold. Where an "
        "upgrade cut a term short, what was not credited to the new plan is earned then; the new plan's whole price, paid "
        "partly by that credit, is earned over its own term.",
        "SELECT month, plan, CAST(SUM(at_end - at_start) AS BIGINT) FROM earned GROUP BY month, plan",
        USD,
    ),
    Metric(
        "plans.deferred",
        "Plan fees billed and not earned yet at the end of the month, a liability beside `deferred`.",
        """SELECT month, '', CAST(SUM(CASE WHEN is_over = 1 THEN 0 ELSE price_nano - at_end END) AS BIGINT)
FROM earned WHERE begun = 1 GROUP BY month""",
        USD,
    ),
    Metric(
        "plans.active",
        "Paid plan terms in force at the last instant of the month, by plan.",
        """SELECT m.month, t.plan, COUNT(*) FROM terms t JOIN months m ON t.starts < m.ends AND t.ends >= m.ends
GROUP BY m.month, t.plan""",
        COUNT,
    ),
]

# ---- models and demand ---------------------------------------------------------------------------------------------

MODELS = [
    Metric(
        "tokens",
        "Settled tokens of the month by the class they are priced in; fresh is input that was neither read from nor "
        "written to the cache.",
        """SELECT m.month, s.part, CAST(SUM(CASE s.part
    WHEN 'fresh' THEN prompt_tokens - cached_tokens - cache_write_5m_tokens - cache_write_1h_tokens
    WHEN 'cached' THEN cached_tokens
    WHEN 'cache_write_5m' THEN cache_write_5m_tokens
    WHEN 'cache_write_1h' THEN cache_write_1h_tokens
    ELSE completion_tokens END) AS BIGINT)
FROM usage u JOIN months m ON u.created >= m.starts AND u.created < m.ends CROSS JOIN classes s GROUP BY m.month, s.part""",
        "tokens",
    ),
    Metric(
        "revenue.by_model",
        "revenue.usage by model.",
        "SELECT month, model, CAST(SUM(paid_nano) AS BIGINT) FROM charge_months GROUP BY month, model",
        USD,
    ),
    Metric(
        "compute.milliseconds",
        "Time during which a model had requests in it, summed over workers.",
        "SELECT month, model, milliseconds FROM compute_months",
        "ms",
    ),
    Metric(
        "compute.cost",
        "compute.milliseconds of each hour at the price of a second in force at its start, rounded down.",
        "SELECT month, model, cost_nano FROM compute_months",
        USD,
    ),
    Metric(
        "margin",
        "revenue.by_model less compute.cost: what a model earns over the machines that run it.",
        """SELECT month, model, CAST(SUM(nano) AS BIGINT) FROM (
    SELECT month, model, paid_nano AS nano FROM charge_months
    UNION ALL
    SELECT month, model, -cost_nano FROM compute_months
) AS sides GROUP BY month, model""",
        USD,
    ),
    Metric(
        "rejected",
        "Requests for an answer that were refused or failed, by cause; retries of one call count each.",
        """SELECT m.month, r.cause, CAST(SUM(r.requests) AS BIGINT)
FROM refusals r JOIN months m ON r.hour >= m.starts AND r.hour < m.ends GROUP BY m.month, r.cause""",
        "requests",
    ),
    Metric(
        "rejected.worth",
        "An estimate, not money: rejected requests by cause, each at the mean list price (rounded down) of a settled request "
        "to the same model in the same month.",
        """SELECT r.month, r.cause, CAST(SUM(r.requests * s.mean_nano) AS BIGINT) FROM (
    SELECT m.month, f.model, f.cause, CAST(SUM(f.requests) AS BIGINT) AS requests
    FROM refusals f JOIN months m ON f.hour >= m.starts AND f.hour < m.ends GROUP BY m.month, f.model, f.cause
) AS r JOIN (
    SELECT m.month, u.model, CAST(SUM(u.nano_usd) AS BIGINT) / COUNT(*) AS mean_nano
    FROM usage u JOIN months m ON u.created >= m.starts AND u.created < m.ends GROUP BY m.month, u.model
) AS s ON s.month = r.month AND s.model = r.model GROUP BY r.month, r.cause""",
        USD,
    ),
]

METRICS = (*PAYERS, *REVENUE, _retention(1, "the month"), _retention(12, "the month a year"), *PLANS, *SELLING, *MODELS)

# The parts that some queries spread their sums over.
PARTS = """,
steps (part) AS (VALUES ('start'), ('new'), ('reactivation'), ('expansion'), ('contraction'), ('churn'), ('end')),
classes (part) AS (VALUES ('fresh'), ('cached'), ('cache_write_5m'), ('cache_write_1h'), ('output')),
sides (part) AS (VALUES ('base'), ('kept'), ('net')),
tops (part, most) AS (VALUES ('top 1', 1), ('top 10', 10), ('top 100', 100), ('all', 9999999999))
"""
