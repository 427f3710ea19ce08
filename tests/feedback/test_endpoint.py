"""The judge's address, against a real HTTP server on loopback with planted answers."""

from __future__ import annotations

import math
import threading
import time

import pytest

from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.feedback import endpoint as endpoints
from rlhf_nb.feedback.chat import Question
from rlhf_nb.feedback.endpoint import EndpointChat, checked
from rlhf_nb.feedback.judge import ChatJudge, Comparison, Journaled, all_of, compare_both
from rlhf_nb.feedback.tally import tally
from rlhf_nb.protocol.spec import Endpoint
from tests.feedback.conftest import NEVER

HELLO = Question([{"role": "user", "content": "A or B?"}], ("A", "B"), 8)
SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def chat(chat_server):
    opened = []

    def make(**settings):
        opened.append(EndpointChat(chat_server.endpoint(**settings), sleep=lambda s: waits.append(s)))
        return opened[-1]

    waits: list[float] = []
    make.waits = waits
    yield make
    for each in opened:
        each.close()


def ask(chat, *questions):
    questions = questions or (HELLO,)
    return all_of(chat.ask(questions), len(questions))


def test_a_judge_behind_an_address_is_asked_in_both_orders(chat_server, chat, read_shown):
    chat_server.answer = lambda body: "A" if len(read_shown(body)[1]) > len(read_shown(body)[2]) else "B"
    pairs = [Comparison("Q?", "short", "much longer"), Comparison("Q?", "the longest of all", "tiny")]
    found = tally(compare_both(ChatJudge(chat()), pairs), ["a", "a"])
    assert (found.decided, found.flips, found.agreement.value) == (2, 0, 0.5)
    assert len(chat_server.requests) == 4
    body, headers = chat_server.requests[0], chat_server.headers[0]
    assert headers["path"] == "/v1/chat/completions" and "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_logprobs"]) == ("planted", 0.0, 8, 20)


def test_letters_are_read_from_their_log_probabilities_whatever_space_is_before_them(chat_server, chat):
    top = [("A", 0.5), (" A", 0.2), ("B", 0.2), ("The", 0.1)]
    content = [{"top_logprobs": [{"token": token, "logprob": math.log(p)} for token, p in top]}]
    chat_server.answer = lambda body: {"message": {"content": "B"}, "logprobs": {"content": content}}
    (reply,) = ask(chat())
    assert reply.logprobs == pytest.approx({"A": math.log(0.7), "B": math.log(0.2)})


def test_the_token_goes_into_a_header_and_nowhere_else(chat_server, chat, monkeypatch, caplog, capsys):
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    caplog.set_level(0)
    chat_server.answer = lambda body: (401, {"error": {"message": f"Incorrect key: {SECRET}"}})
    one = chat(token_env="JUDGE_TOKEN")
    with pytest.raises(ComputeError, match=r"refused \(401\): Incorrect key: ….*token_env=JUDGE_TOKEN") as refused:
        ask(one)
    assert chat_server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    seen = [str(refused.value), caplog.text, *capsys.readouterr(), one.endpoint.model_dump_json(), one.name,
            str(chat_server.requests)]  # fmt: skip
    assert not any(SECRET in text for text in seen)


def test_a_token_that_is_not_there_is_named_by_its_variable(chat_server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(SpecError, match="token_env=NO_SUCH_TOKEN: not set where the job runs"):
        EndpointChat(chat_server.endpoint(token_env="NO_SUCH_TOKEN"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "ftp://judge"}, "is no http URL"),
        ({"url": "judge:8000"}, "is no http URL"),
        ({"url": "https://me:hunter2@judge/v1"}, "holds no user, password or query"),
        ({"url": "https://judge/v1?key=hunter2"}, "holds no user, password or query"),
        ({"url": "http://[judge"}, "no URL"),
        ({"url": "http://judge.example.com/v1", "token_env": "KEY"}, "over http the token could be read"),
        ({"url": "https://judge/v1", "token_env": "sk-hunter2"}, "the NAME of an environment variable"),
        ({"url": "https://judge/v1", "token_env": "hf_hunter2AbC"}, "in capitals such as JUDGE_TOKEN, not the token"),
    ],
)
def test_an_address_that_would_give_something_away_is_refused_without_repeating_it(settings, said):
    with pytest.raises(SpecError, match=said) as refused:
        checked(Endpoint(model="m", **settings))
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_token_may_go_over_http_to_this_machine():
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert checked(Endpoint(model="m", url=f"http://{host}/v1", token_env="KEY"))


def test_what_is_busy_is_asked_again_later_and_when_it_says(chat_server, chat):
    replies = iter([(429, {}, {"Retry-After": "7"}), (503, {}), "B"])
    chat_server.answer = lambda body: next(replies)
    one = chat()
    (reply,) = ask(one)
    assert reply.text == "B" and len(chat_server.requests) == 3
    assert chat.waits[0] == 7 and 0.5 * 2 * endpoints.BACKOFF_S <= chat.waits[1] <= 2 * endpoints.BACKOFF_S


def test_a_wait_that_the_server_asks_for_is_held_within_limits(chat_server, chat):
    replies = iter([(429, {}, {"Retry-After": "999999"}), (429, {}, {"Retry-After": "-5"}), "B"])
    chat_server.answer = lambda body: next(replies)
    ask(chat())
    assert chat.waits == [endpoints.BACKOFF_LIMIT_S, 0]


def test_one_that_never_answers_is_a_timeout_and_the_others_have_theirs(chat_server, chat):
    chat_server.answer = lambda body: NEVER if "slow" in str(body) else "A"
    slow = Question([{"role": "user", "content": "slow"}], (), 8)
    replies = ask(chat(timeout_s=5, retries=1), slow, HELLO)
    assert [reply.failure for reply in replies] == ["timeout", ""]
    assert replies[0].detail == "no answer within 5 s"
    assert len(chat_server.requests) == 3


def test_a_server_that_trickles_does_not_hold_a_question_for_ever(chat_server, chat):
    # Its headers promise a long body, of which too little comes in time.
    chat_server.answer = lambda body: (200, b"{", {"Content-Length": "1000"})
    began = time.monotonic()
    (reply,) = ask(chat(timeout_s=0.5, retries=0))
    assert reply.failure in ("timeout", "error") and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("choice", "failure"),
    [
        ({"message": {"content": None, "refusal": "I will not judge."}}, "refusal"),
        ({"message": {"content": ""}, "finish_reason": "content_filter"}, "refusal"),
        ((400, {"error": {"message": "policy", "code": "content_filter"}}), "refusal"),
        ((400, {"error": {"message": "maximum context length is 512 tokens"}}), "too_long"),
        ((413, {}), "too_long"),
        ((200, {"choices": []}), "error"),
        ((200, b"<html>"), "error"),
        ((200, b"[" * 100_000), "error"),
        ((200, {"choices": [{"message": {"content": ["a part"]}}]}), "error"),
    ],
)
def test_an_answer_that_is_none_has_its_cause(chat_server, chat, choice, failure):
    chat_server.answer = lambda body: choice
    (reply,) = ask(chat(retries=0))
    assert (reply.failure, reply.text) == (failure, "")


def test_half_a_character_in_an_answer_can_be_kept(chat_server, tmp_path):
    chat_server.answer = lambda body: (200, b'{"choices": [{"message": {"content": "\\ud800 is odd"}}]}')
    judge = Journaled(ChatJudge(EndpointChat(chat_server.endpoint())), tmp_path / "said.jsonl")
    ((_, verdict),) = judge.compare([Comparison("Q?", "x", "y")])
    assert verdict.text == "? is odd" and verdict.failure == "unreadable"
    judge.close()


def test_parameters_that_a_server_does_not_know_are_left_out(chat_server, chat):
    def picky(body):
        if "logprobs" in body:
            return 400, {"error": {"message": "'logprobs' is not supported with this model"}}
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'"}}
        return "A"

    chat_server.answer = picky
    one = chat(at_once=4)
    assert [reply.text for reply in ask(one, *[HELLO] * 8)] == ["A"] * 8
    before = len(chat_server.requests)
    assert ask(one)[0].text == "A" and len(chat_server.requests) == before + 1
    assert chat_server.requests[-1]["max_completion_tokens"] == 8


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, r"refused \(404\): no such model; url= ends before /chat/completions"),
        (400, r"refused \(400\): no such model$"),
    ],
)
def test_what_no_question_would_survive_ends_the_job_in_one_line(chat_server, chat, status, said):
    chat_server.answer = lambda body: (status, {"error": {"message": "no such model\nand more"}})
    with pytest.raises(ComputeError, match=said):
        ask(chat(), *[HELLO] * 5)


def test_an_address_where_nothing_answers_is_said_after_the_retries(chat_server):
    settings = chat_server.endpoint(retries=1)
    chat_server.close()
    waits: list[float] = []
    chat = EndpointChat(settings, sleep=waits.append)
    with pytest.raises(ComputeError, match=r"judge url=http://127.0.0.1:\d+/v1: nothing answers there .*then resume"):
        ask(chat)
    assert len(waits) == 1
    chat.close()


def test_at_most_so_many_questions_are_under_way(chat_server, chat):
    lock, under_way, most, three = threading.Lock(), [0], [0], threading.Barrier(3)
    waits_for_two_more = iter([True] * 3 + [False] * 9)

    def slow(body):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            waits = next(waits_for_two_more)
        if waits:
            three.wait(30)
        time.sleep(0.03)
        with lock:
            under_way[0] -= 1
        return "A"

    chat_server.answer = slow
    ask(chat(at_once=3, timeout_s=60), *[HELLO] * 12)
    assert most[0] == 3


def test_where_nobody_waits_any_more_nothing_is_tried_again(chat_server, chat):
    chat_server.answer = lambda body: "A" if "quick" in str(body) else (503, {})
    quick = Question([{"role": "user", "content": "quick"}], (), 8)
    waiting = threading.Event()
    one = chat(retries=50, at_once=4)
    one._sleep = lambda _: waiting.wait(5)
    answers = one.ask([quick, HELLO, HELLO])
    assert next(answers)[1].text == "A"
    while len(chat_server.requests) < 3:
        time.sleep(0.01)
    answers.close()
    waiting.set()
    time.sleep(0.2)
    assert len(chat_server.requests) == 3


def test_a_connection_that_the_server_may_be_ending_is_not_used_again(chat_server, chat, monkeypatch):
    monkeypatch.setattr(endpoints, "IDLE_S", 0.05)
    one = chat()
    ask(one)
    time.sleep(0.2)
    ask(one)
    assert len({headers["port"] for headers in chat_server.headers}) == 2


def test_a_redirect_is_not_followed_with_the_token(chat_server, chat, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    chat_server.answer = lambda body: (307, {}, {"Location": "http://127.0.0.1:9/steal"})
    with pytest.raises(ComputeError, match=r"refused \(307\)"):
        ask(chat(token_env="JUDGE_TOKEN"))
