"""What a term does to the process it runs in, and to the stream: who notices, and who is blamed."""

from __future__ import annotations

import pytest

from port_client import PATHOLOGICAL, PortClient, compute, l2


@pytest.fixture
def own():
    """A worker that the test may end."""
    with PortClient(load=[PATHOLOGICAL]) as client:
        yield client


@pytest.fixture(scope="module")
def shared():
    with PortClient(load=[PATHOLOGICAL]) as client:
        yield client


@pytest.fixture
def worker(shared):
    yield shared
    shared.assert_serving()


def custom(reply):
    return reply["record"]["regularizers"]["term"]["custom"]


class TestForks:
    def test_a_crash_is_seen_at_once_though_a_daemon_was_left_behind(self, own):
        own.send("compute", **compute("pathological:daemonizes_and_crashes"))
        assert own.receive(timeout=20) is None
        assert own.process.wait(20) == 3

    @pytest.mark.parametrize("how", [{}, {"run_in_executor": True}])
    @pytest.mark.parametrize("fn", ["returns_twice", "returns_twice_async"])
    def test_of_a_fork_that_returns_twice_one_answers(self, worker, fn, how):
        before = len(worker.printed())
        reply = worker.ask("compute", **compute(f"pathological:{fn}", **how))
        assert custom(reply) == {"status": 70}
        assert "a term forked a process, which came back from the term" in worker.printed()[before:]

    def test_of_a_fork_that_raises_twice_one_answers(self, worker):
        error = worker.error(**compute("pathological:raises_twice"))
        assert "in the parent" in error["message"]


class TestTheStream:
    def test_it_is_not_where_a_term_would_hit_it_by_mistake(self, worker):
        spec = compute("pathological:writes_to_descriptor_4")
        assert worker.ask("compute", **spec)["op"] == "result"


class TestBlame:
    @pytest.mark.parametrize("how", [{}, {"run_in_executor": True}, {"run_in_executor": "process"}])
    def test_an_exception_that_cannot_be_shown_is_the_terms(self, worker, how):
        spec = compute("pathological:raises_what_cannot_be_shown", **how)
        error = worker.error(**spec)
        assert (error["kind"], error["term"]) == ("term", "term")
        assert error["type"] == "pathological.CannotBeShown"
        assert "its __str__ raised RuntimeError" in error["message"]
        assert "raise CannotBeShown" in error["traceback"]

    def test_so_it_is_if_it_was_awaited(self, worker):
        error = worker.error(**compute("pathological:raises_what_cannot_be_shown_async"))
        assert (error["kind"], error["term"]) == ("term", "term")

    def test_a_worker_that_answers_nothing_but_internal_ends(self, own):
        assert own.ask("compute", **compute("pathological:breaks_the_package"))["op"] == "result"
        for _ in range(3):
            error = own.ask("compute", **l2())["error"]
            assert error["kind"] == "internal"
            assert "broken by a test" in error["message"]
        assert own.receive() is None
        assert own.process.wait(20) == 3
        assert "3 requests in a row" in own.logs[-1]["message"]
