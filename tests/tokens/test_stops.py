"""Stop strings: found wherever tokens are cut, and nothing is held back that can no longer become one."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidelock.tokens.message import Message
from tidelock.tokens.stops import StopFinder
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

text = st.text(alphabet="abé😀\n", max_size=30)
stops = st.lists(st.text(alphabet="abé😀\n", min_size=1, max_size=5), min_size=1, max_size=3)


def naive(data: bytes, stops: list[str]):
    """(end, stop) of the stop that is complete first; the longest of those that end together."""
    for end in range(len(data) + 1):
        here = [s for s in stops if data[:end].endswith(s.encode())]
        if here:
            return end, max(here, key=lambda s: len(s.encode()))
    return None


def could_grow(data: bytes, stops: list[str]) -> int:
    return max(n for n in range(len(data) + 1) if n == 0 or any(
        s.encode().startswith(data[len(data) - n :]) and n < len(s.encode()) for s in stops))  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(text, stops, st.data())
@example("xé", ["é"], None)
def test_a_stop_is_found_at_every_cutting_and_the_least_is_held_back(words, stops, data):
    raw = words.encode()
    cuts = range(1, len(raw)) if data is None else sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    edges = [0, *cuts, len(raw)]
    pieces = [raw[a:b] for a, b in zip(edges, edges[1:])]
    finder, want = StopFinder(stops), naive(raw, stops)
    fed, sent = b"", 0
    for n, piece in enumerate(pieces):
        fed += piece
        found = finder.feed(piece)
        if want and len(fed) >= want[0]:
            among = [s for s in stops if s.encode() in fed]
            assert found in among and raw.index(found.encode()) >= sent and fed.index(found.encode()) + len(found.encode()) == want[0]
            return
        assert found is None
        # Tokens held back: as many of the latest as the open bytes lie in, and no more.
        need, open_bytes = 0, could_grow(fed, stops)
        while len(b"".join(pieces[n + 1 - need : n + 1])) < open_bytes:
            need += 1
        assert finder.held == need
        sent = len(fed) - len(b"".join(pieces[n + 1 - need : n + 1]))
    assert want is None


def test_markup_breaks_a_stop():
    finder = StopFinder(["ab"])
    assert [finder.feed(p) for p in (b"a", None, b"b")] == [None, None, None] and finder.held == 0


def test_stops_look_at_the_content_and_a_cut_answer_ends_before_one():
    for name in ("xtml", "chatml"):
        template = get_template(name, ByteTokenizer())
        answer = Message("assistant", "one. two. STOP three", reasoning="STOP is not yet")
        ids = template.sampled(answer)
        read, finder = template.text_reader([1, *template.generation_prompt()]), StopFinder(["STOP"])
        end = next(n for n, token in enumerate(ids, 1) if finder.feed(read(token)))
        parser = template.parser()
        shown = [d for d in parser.feed(ids[: end - 6]) if d.kind == "content"]
        shown += [d for d in parser.feed(ids[end - 6 : end], "STOP") if d.kind == "content"]
        message = parser.finish()
        assert message.content == "".join(d.text for d in shown) == "one. two. "
        assert message.reasoning == answer.reasoning and list(message.verbatim) == ids[:end]


def test_a_prefilled_answer_goes_on_where_it_was_left():
    template = get_template("xtml", ByteTokenizer())
    answer = template.sampled(Message("assistant", "one two"))
    at = answer.index(ord("w"), 20)
    prompt = [*template.render([Message("user", "x")], generation_prompt=True), *answer[:at]]
    read = template.text_reader(prompt)
    assert [read(i) for i in answer[at : at + 3]] == [b"w", b"o", None]


def test_outside_a_chat_turn_all_text_is_looked_at():
    template = get_template("xtml", ByteTokenizer())
    read = template.text_reader([*template.render([Message("user", "x")], generation_prompt=True)[:-1], 1, 2, 3])
    assert [read(i) for i in (65, template.stop_ids[0])] == [b"A", None]
