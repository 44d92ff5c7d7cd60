"""Metrics of how the service is sold: who climbs the tiers and how fast, what a price change did to demand, and how much of
the capacity sold as plans is used. The relations they stand on are here too."""

from __future__ import annotations

from collections.abc import Sequence

from tidelock.service.analytics.metric import COUNT, SECONDS, USD, Metric

RELATIONS = """,
-- money paid in less paid back, after every transaction that moved it
recharges (customer, seq, created, nano) AS (
    SELECT t.customer, t.seq, t.created, CAST(SUM(-e.nano_usd) AS BIGINT)
    FROM transactions t JOIN entries e ON e.customer = t.customer AND e.seq = t.seq
    WHERE e.kind IN ('outside', 'refunds') GROUP BY t.customer, t.seq, t.created
),
recharged (customer, created, total) AS MATERIALIZED (
    SELECT customer, created, SUM(nano) OVER (PARTITION BY customer ORDER BY seq) FROM recharges
),
-- the first moment at which a customer had recharged what a tier asks for; everybody begins on the lowest
reached (customer, tier, at) AS MATERIALIZED (
    SELECT customer, 0, created FROM customers WHERE created > 0
    UNION ALL
    SELECT r.customer, t.tier, MIN(r.created) FROM recharged r JOIN tiers t ON t.tier > 0 AND r.total >= t.from_nano
    GROUP BY r.customer, t.tier
),
recharge_months (n, customer, nano) AS (
    SELECT m.n, r.customer, CAST(SUM(r.nano) AS BIGINT) FROM recharges r
    JOIN months m ON r.created >= m.starts AND r.created < m.ends GROUP BY m.n, r.customer
),
standing (month, customer, total) AS (
    SELECT m.month, r.customer, CAST(SUM(r.nano) AS BIGINT) FROM months m JOIN recharge_months r ON r.n <= m.n
    GROUP BY m.month, r.customer
),
-- the last month before a new version of the price book took effect, and the first whole one under it
price_changes (before, after) AS (
    SELECT DISTINCT m.n - 1, m.n + CASE WHEN v.effective = m.starts THEN 0 ELSE 1 END
    FROM price_versions v JOIN months m ON v.effective >= m.starts AND v.effective < m.ends
    WHERE v.effective > (SELECT MIN(effective) FROM price_versions)
),
model_months (n, model, tokens, list_nano) AS (
    SELECT m.n, u.model, CAST(SUM(u.prompt_tokens + u.completion_tokens) AS BIGINT), CAST(SUM(u.nano_usd) AS BIGINT)
    FROM usage u JOIN months m ON u.created >= m.starts AND u.created < m.ends GROUP BY m.n, u.model
),
changed (month, model, tokens_before, list_before, tokens_after, list_after) AS (
    SELECT m.month, b.model, b.tokens, b.list_nano, a.tokens, a.list_nano FROM price_changes c
    JOIN model_months b ON b.n = c.before JOIN model_months a ON a.n = c.after AND a.model = b.model JOIN months m ON m.n = c.after
)
"""


def tiers(thresholds: Sequence[int]) -> str:
    """`thresholds`: the nano-USD recharged from which each tier of the ladder begins; the lowest is everybody's."""
    rows = ", ".join(f"({tier}, {nano})" for tier, nano in enumerate(thresholds or (0,)))
    return f",\ntiers (tier, from_nano) AS (VALUES {rows})"


def _change(side: str, what: str, words: str, unit: str) -> Metric:
    return Metric(
        f"price_change.{what}_{side}",
        f"{words} by model in the {'last whole month before' if side == 'before' else 'first whole month after'} a new version "
        "of the price book took effect, shown in the month after; a month in which it did is in neither.",
        f"SELECT month, model, CAST(SUM({what}_{side}) AS BIGINT) FROM changed GROUP BY month, model",
        unit,
    )


SELLING = [
    Metric(
        "tiers.customers",
        "Customers that ever recharged, by the tier that all they have recharged, less refunds, gives at the end of the month, on the ladder "
        "in force today; tiers set by hand do not count.",
        """SELECT s.month, 'tier ' || (SELECT MAX(t.tier) FROM tiers t WHERE t.tier = 0 OR t.from_nano <= s.total), COUNT(*)
FROM standing s GROUP BY 1, 2""",
        COUNT,
    ),
    Metric(
        "tiers.reached",
        "Customers that had for the first time recharged what the tier asks for, in the month: the funnel's steps.",
        """SELECT m.month, 'tier ' || r.tier, COUNT(*) FROM reached r JOIN months m ON r.at >= m.starts AND r.at < m.ends
WHERE r.tier > 0 GROUP BY m.month, r.tier""",
        COUNT,
    ),
    Metric(
        "tiers.dwell_seconds",
        "Median (the lower of two) time spent on a tier before the next, over the customers that reached the next in the month; "
        "who skipped the tier is not counted.",
        """SELECT month, part, seconds FROM (
    SELECT m.month, 'tier ' || a.tier AS part, b.at - a.at AS seconds, COUNT(*) OVER (PARTITION BY m.month, a.tier) AS many,
           ROW_NUMBER() OVER (PARTITION BY m.month, a.tier ORDER BY b.at - a.at) AS place
    FROM reached a JOIN reached b ON b.customer = a.customer AND b.tier = a.tier + 1
    JOIN months m ON b.at >= m.starts AND b.at < m.ends WHERE b.at > a.at
) AS ranked WHERE place = (many + 1) / 2""",
        SECONDS,
    ),
    _change("before", "tokens", "Settled tokens", "tokens"),
    _change("after", "tokens", "Settled tokens", "tokens"),
    _change("before", "list", "Usage at list price", USD),
    _change("after", "list", "Usage at list price", USD),
    Metric(
        "capacity.sold",
        "Plan credits granted in the month, by plan: what a plan's customers may use at most, at list price.",
        """SELECT m.month, t.detail, CAST(SUM(e.nano_usd) AS BIGINT) FROM transactions t
JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind = 'plan'
JOIN months m ON t.created >= m.starts AND t.created < m.ends WHERE t.kind = 'plan_grant' GROUP BY m.month, t.detail""",
        USD,
    ),
    Metric(
        "capacity.served",
        "Plan credits that requests took in the month, less what they gave back, by plan: the part of capacity.sold that was "
        "really asked of the machines.",
        """SELECT m.month, COALESCE(g.detail, ''), CAST(SUM(-e.nano_usd) AS BIGINT) FROM transactions t
JOIN entries e ON e.customer = t.customer AND e.seq = t.seq AND e.kind = 'plan'
JOIN months m ON t.created >= m.starts AND t.created < m.ends LEFT JOIN transactions g ON g.kind = 'plan_grant' AND g.reference = e.lot
WHERE t.kind IN ('hold', 'extend', 'settle', 'release') GROUP BY 1, 2""",
        USD,
    ),
]
