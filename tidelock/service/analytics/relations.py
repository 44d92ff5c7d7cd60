"""The thin layer between the stored tables and the metrics: named relations, put before every query as its WITH clause.

What a metric may know of the books stands here once. When a table changes shape, or plans come from another table, one
relation is rewritten and no metric. The SQL is what SQLite and PostgreSQL read alike: sums are cast back to BIGINT
(PostgreSQL's are numeric) and whole-number division truncates.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidelock.service.analytics.calendar import Month

RELATIONS = """
-- what re-rating charged or gave back, in the month it was booked; a closed month never changes
rerates (customer, request_id, created, list_nano, credit_nano) AS (
    SELECT a.customer, a.request_id, t.created, a.nano_usd, -CAST(COALESCE(SUM(e.nano_usd), 0) AS BIGINT)
    FROM adjustments a
    JOIN transactions t ON t.kind = 'rerate' AND t.reference = a.request_id || '/' || a.price_version
    LEFT JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind IN ('voucher', 'plan')
    GROUP BY a.customer, a.request_id, a.price_version, t.created, a.nano_usd
),
-- settled debits: list price = paid in money + paid in credits
charges (customer, model, created, credit_nano, paid_nano) AS (
    SELECT customer, model, created, credit_nano, nano_usd - credit_nano FROM usage
    UNION ALL
    SELECT r.customer, u.model, r.created, r.credit_nano, r.list_nano - r.credit_nano
    FROM rerates r JOIN usage u ON u.request_id = r.request_id
),
charge_months (month, n, customer, model, credit_nano, paid_nano, paid_calls) AS MATERIALIZED (
    SELECT m.month, m.n, c.customer, c.model, CAST(SUM(c.credit_nano) AS BIGINT), CAST(SUM(c.paid_nano) AS BIGINT),
           CAST(SUM(CASE WHEN c.paid_nano > 0 THEN 1 ELSE 0 END) AS BIGINT)
    FROM charges c JOIN months m ON c.created >= m.starts AND c.created < m.ends
    GROUP BY m.month, m.n, c.customer, c.model
),
customer_months (month, n, customer, paid_nano, paid_calls) AS MATERIALIZED (
    SELECT month, n, customer, CAST(SUM(paid_nano) AS BIGINT), CAST(SUM(paid_calls) AS BIGINT)
    FROM charge_months GROUP BY month, n, customer
),
payers (month, n, customer, paid_nano) AS MATERIALIZED (
    SELECT month, n, customer, paid_nano FROM customer_months WHERE paid_calls > 0
),
cohorts (customer, month, n) AS MATERIALIZED (
    SELECT customer, MIN(month), MIN(n) FROM payers GROUP BY customer
),
-- movements of every kind of account by kind of transaction
ledger_months (month, n, booked, account, nano) AS MATERIALIZED (
    SELECT m.month, m.n, t.kind, e.kind, CAST(SUM(e.nano_usd) AS BIGINT)
    FROM transactions t
    JOIN entries e ON e.customer = t.customer AND e.seq = t.seq
    JOIN months m ON t.created >= m.starts AND t.created < m.ends
    GROUP BY m.month, m.n, t.kind, e.kind
),
regions (customer, region, currency) AS (
    SELECT c.customer, COALESCE(b.entity, 'default') || ' ' || COALESCE(b.currency, 'USD'), COALESCE(b.currency, 'USD')
    FROM customers c LEFT JOIN billing b ON b.customer = c.customer
),
region_months (month, region, currency, paid_nano, payers) AS MATERIALIZED (
    SELECT c.month, r.region, r.currency, CAST(SUM(c.paid_nano) AS BIGINT),
           CAST(SUM(CASE WHEN c.paid_calls > 0 THEN 1 ELSE 0 END) AS BIGINT)
    FROM customer_months c JOIN regions r ON r.customer = c.customer
    GROUP BY c.month, r.region, r.currency
),
-- plans that were paid for
terms (customer, plan, starts, ends, mrr_nano) AS (
    SELECT customer, plan, starts, ends, price_nano / months FROM plan_terms WHERE price_nano > 0
),
-- of each term's price, what was earned by the start and by the end of each month: evenly by the second over the term as it
-- was sold; a term that was cut short is earned at that moment, less what was credited to the plan that took its place.
-- (price / d * x + price % d * x / d) is floor(price * x / d) within 64 bits
earned (month, plan, begun, price_nano, at_start, at_end, is_over) AS MATERIALIZED (
    SELECT m.month, t.plan, CASE WHEN t.begins_s < m.ends THEN 1 ELSE 0 END, t.price_nano,
           CASE WHEN m.starts >= t.cut_s THEN t.price_nano - t.credited_nano
                WHEN m.starts <= t.begins_s THEN 0
                WHEN m.starts >= t.planned_s THEN t.price_nano
                ELSE t.price_nano / t.seconds * (m.starts - t.begins_s) + t.price_nano % t.seconds * (m.starts - t.begins_s) / t.seconds
           END,
           CASE WHEN m.ends >= t.cut_s THEN t.price_nano - t.credited_nano
                WHEN m.ends <= t.begins_s THEN 0
                WHEN m.ends >= t.planned_s THEN t.price_nano
                ELSE t.price_nano / t.seconds * (m.ends - t.begins_s) + t.price_nano % t.seconds * (m.ends - t.begins_s) / t.seconds
           END,
           CASE WHEN m.ends >= t.cut_s THEN 1 ELSE 0 END
    FROM (SELECT plan, begins_s, planned_s, cut_s, credited_nano, price_nano, NULLIF(planned_s - begins_s, 0) AS seconds
          FROM plan_terms WHERE price_nano > 0) AS t CROSS JOIN months m
),
-- recurring revenue in force at the last instant of each month
mrr (n, customer, nano) AS (
    SELECT m.n, t.customer, CAST(SUM(t.mrr_nano) AS BIGINT)
    FROM terms t JOIN months m ON t.starts < m.ends AND t.ends >= m.ends
    GROUP BY m.n, t.customer
),
mrr_firsts (customer, n) AS (
    SELECT customer, MIN(n) FROM mrr GROUP BY customer
),
mrr_moves (month, start_nano, end_nano, is_first) AS MATERIALIZED (
    SELECT m.month, COALESCE(b.nano, 0), COALESCE(e.nano, 0), CASE WHEN f.n = m.n THEN 1 ELSE 0 END
    FROM months m CROSS JOIN mrr_firsts f
    LEFT JOIN mrr b ON b.customer = f.customer AND b.n = m.n - 1
    LEFT JOIN mrr e ON e.customer = f.customer AND e.n = m.n
),
compute_months (month, model, milliseconds, cost_nano) AS MATERIALIZED (
    SELECT m.month, c.model, CAST(SUM(c.milliseconds) AS BIGINT), CAST(SUM(c.milliseconds * COALESCE((
               SELECT r.nano_usd FROM compute_rates r
               WHERE r.model = c.model AND r.starts <= c.hour ORDER BY r.starts DESC LIMIT 1), 0) / 1000) AS BIGINT)
    FROM compute c JOIN months m ON c.hour >= m.starts AND c.hour < m.ends
    GROUP BY m.month, c.model
)
"""


def with_clause(months: Sequence[Month], base: str) -> str:
    """`base`: the month whose exchange rates the constant-currency view uses."""
    rows = ", ".join(f"('{m.name}', {n}, {m.starts}, {m.ends})" for n, m in enumerate(months))
    return f"WITH months (month, n, starts, ends) AS (VALUES {rows}),\nbase (month) AS (VALUES ('{base}')),{RELATIONS}"
