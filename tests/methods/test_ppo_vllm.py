"""vLLM for real, on the CPU, in an environment of its own: the same tokens, the same log-probabilities after every way
of handing weights over, and PPO through it from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_nb.compute.supervisor import end_tree
from rlhf_nb.data.rows import decode_rows
from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.feedback.chat import Question
from rlhf_nb.feedback.endpoint import EndpointChat
from rlhf_nb.feedback.judge import all_of
from rlhf_nb.feedback.local import LocalChat
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.protocol.spec import Endpoint, LoRA, PathModel
from rlhf_nb.training import export
from rlhf_nb.training.data import prompt_ids
from rlhf_nb.training.rollout.base import uniforms
from rlhf_nb.training.rollout.vllm_backend import VLLMSampler
from rlhf_nb.training.rollout.vllm_engine import Drawn, InProcess, Server, loopback, rank_for
from rlhf_nb.training.rollout.vllm_nccl import NCCLTransfer
from tests.servers import free_port

from .conftest import LETTERS, ROWS, fold
from .test_ppo_ranks import FSDP, ranks  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 56], [60, 61]]
CONFIG = {
    "max_steps": 4, "rollout_batch_size": 8, "batch_size": 4, "num_ppo_epochs": 1, "max_new_tokens": 8,
    "max_length": 80, "sample_every": 4, "learning_rate": 3e-3, "kl_coef": 0.2,
}  # fmt: skip
JOB = (
    "import sys; from pathlib import Path; from rlhf_nb.training import job\n"
    "place = Path(sys.argv[1])\n"
    "job.run(place, blobs=place.parent, runs_root=place.parent, rank=0, world_size=1, warm=False, attempt=1,"
    " resume_from=None)"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has vLLM."""
    path = Path(os.environ.get("RLHF_NB_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not path.exists():
        reason = f"no vLLM at {path}; `make .venv-vllm/.ready` puts it there"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(path)


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }


@contextmanager
def serving(python: str, model: Path, folder: Path, *flags: str, **switches: str) -> Iterator[str]:
    """A vLLM server on a port of its own."""
    port = free_port()
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "start",
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "64", "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs", *flags,
    ]  # fmt: skip
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(**switches), cwd=folder, start_new_session=True
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        end_tree(server.pid)
        server.wait(30)


@pytest.fixture(scope="module")
def model(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("vllm") / "start", dropout=0.0, head_dim=32)


@pytest.fixture(scope="module")
def url(python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    flags = ("--enable-lora", "--max-lora-rank", "8")
    with serving(python, model, tmp_path_factory.mktemp("server"), *flags, **switches) as url:
        yield url


def logprobs(policy: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    picked = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
    return picked.squeeze(1).tolist()


def sampler(engine: Any, policy: Any, folder: Path) -> VLLMSampler:
    return VLLMSampler(
        engine, policy, end_tokens={1}, pad_token=0, device=torch.device("cpu"), scratch=folder / "weights",
        probe=PROMPTS[0], logprobs=lambda p, c, t: logprobs(policy, list(p), list(c), t), tolerance=1e-3,
    )  # fmt: skip


def apart(sampled: Any, policy: Any, temperature: float) -> float:
    """Largest difference of a token's log-probability, nats."""
    worst = 0.0
    for row, prompt in enumerate(PROMPTS):
        mask = sampled.mask_BT[row]
        said, theirs = sampled.tokens_BT[row][mask].tolist(), sampled.behavior_logprobs_BT[row][mask].tolist()
        ours = logprobs(policy, prompt, said, temperature)
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    return worst


def moved(policy: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_after_every_hand_over_a_server_samples_from_the_policy_of_now(url, model, tmp_path, adapter):
    policy: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter:
        from peft import LoraConfig, get_peft_model

        with closing(Server(url, ends={1}, adapter=None)) as engine:
            engine.load_weights(model)
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    noise = uniforms(0, 0, range(3), 10)
    with closing(sampler(Server(url, ends={1}, adapter="policy" if adapter else None), policy, tmp_path)) as mine:
        said = []
        for version in range(3):
            moved(policy, version)
            mine.refresh(version)
            for temperature in (1.0, 0.7):
                sampled = mine.sample(PROMPTS, noise, temperature=temperature)
                assert apart(sampled, policy, temperature) < 1e-4
            said.append(sampled.tokens_BT.tolist())
            assert mine.sample(PROMPTS, noise, temperature=0.7).tokens_BT.tolist() == said[-1], "seeded by the noise"
        assert len({json.dumps(one) for one in said}) == 3, "other weights say something else"


def test_a_server_that_leaves_the_temperature_out_of_its_logprobs_is_told_how_to_start(url, model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        genuine = engine.sample

        def raw(prompts: Any, seeds: Any, **settings: Any) -> list[Drawn]:
            drawn = genuine(prompts, seeds, **settings)
            return [Drawn(d.tokens, logprobs(policy, list(p), d.tokens)) for p, d in zip(prompts, drawn, strict=True)]

        engine.sample = raw  # type: ignore[method-assign]
        with pytest.raises(ComputeError, match="start the server with --logprobs-mode processed_logprobs"):
            sampler(engine, policy, tmp_path).refresh(0)


def test_an_adapter_on_another_base_is_not_believed(url, model, tmp_path, save_model):
    from peft import LoraConfig, get_peft_model

    other = AutoModelForCausalLM.from_pretrained(model).eval()
    moved(other, 7)
    policy = get_peft_model(other, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with closing(sampler(Server(url, ends={1}, adapter="policy"), policy, tmp_path)) as mine:
        with pytest.raises(ComputeError, match="start the server with the model that this run starts from"):
            mine.refresh(0)


def test_greedy_tokens_are_those_of_transformers(url, model):
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        engine.load_weights(model)
        drawn = engine.sample(PROMPTS, [0, 0, 0], temperature=0.0, limit=12)
    for prompt, one in zip(PROMPTS, drawn, strict=True):
        tokens = list(prompt)
        for said in one.tokens:
            with torch.no_grad():
                best = int(policy(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            assert said == best
            tokens.append(best)


def test_a_judge_behind_a_server_says_what_the_same_model_says_here(url, model):
    """Letters by their log-probabilities, texts at temperature 0, and a question too long for its context."""
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        engine.load_weights(model)
    here = LocalChat.load(str(model), name="here", device="cpu")
    asked = []
    for n in (1, 3, 9):
        messages = [{"role": "user", "content": "Who? " * n}]
        likeliest = here.model(torch.tensor([prompt_ids(messages, here.tokenizer)])).logits[0, -1].argsort().tolist()
        said = (here.tokenizer.decode([token]) for token in likeliest[::-1][:20])
        letters = tuple(text for text in said if text.isascii() and text.isprintable() and text.strip() == text != "")
        asked += [Question(messages, letters=letters[:2], max_tokens=1), Question(messages, max_tokens=12)]
    assert all(len(question.letters) == 2 for question in asked[::2])
    there = EndpointChat(Endpoint(url=f"{url}/v1", model="start"))
    with closing(here), closing(there):
        mine, served = (all_of(chat.ask(asked), len(asked)) for chat in (here, there))
        (long,) = all_of(there.ask([Question([{"role": "user", "content": "Who? " * 99}], max_tokens=12)]), 1)
    for one, other in zip(mine, served, strict=True):
        # The server holds back the bytes of a character that is not whole yet.
        assert other.failure == "" and other.text.strip() == one.text.rstrip("\ufffd").strip()
        assert (other.logprobs or {}) == pytest.approx(one.logprobs or {}, abs=1e-3)
    assert long.failure == "too_long"


def test_a_server_that_still_samples_from_other_weights_is_not_believed(url, model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        engine.load_weights(model)
        engine.load_weights = lambda directory: None  # type: ignore[method-assign]
        mine = sampler(engine, policy, tmp_path)
        mine.refresh(0)
        moved(policy, 1)
        with pytest.raises(ComputeError, match="log-probabilities differ from the trainer's by"):
            mine.refresh(1)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_ppo_trains_through_a_server(url, model, job, adapter):
    job.model = model
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        engine.load_weights(model)
    config = {**CONFIG, "rollout_backend": "vllm_server", "vllm_url": url, "importance_cap": 2.0}
    place = job("ppo", ROWS, config=config, reward=LETTERS, adapter=adapter)
    check(place, corrected=True)
    assert not (place.path / "sampler").exists()
    names = [one["id"] for one in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]]
    assert names == ["start"], "the run's adapter is gone from the server"


def test_two_ranks_that_share_weights_in_shards_train_through_a_server(url, model, ranks):  # noqa: F811
    ranks.job.model = model
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        engine.load_weights(model)
    config = ranks.job.root / "fsdp.yaml"
    config.write_text(FSDP.format(version=2))
    knobs = {**CONFIG, "rollout_backend": "vllm_server", "vllm_url": url}
    place = ranks.prepare("two", 2, flags=f"--config_file {config} --num_processes 2", **knobs)
    ranks(place)
    assert min(int((place.path / f"shards-{rank}").read_text()) for rank in (0, 1)) > 10
    check(place, corrected=False)


def check(place: Any, *, corrected: bool) -> None:
    rows = {row["step"]: row for row in fold(place).table()}
    assert sorted(rows) == [1, 2, 3, 4]
    for first in (1, 3):
        assert rows[first]["rollout/logprob_mismatch"] < 1e-4 and rows[first]["time/sync_s"] > 0
        assert ("policy/importance_weight" in rows[first]) == corrected
    assert abs(rows[1]["kl/policy_reference"]) < 1e-3 < abs(rows[3]["kl/policy_reference"])
    assert not [notice.code for notice in fold(place).notices if notice.code.startswith("kl_doctor/mismatch")]
    assert any(event.kind == "samples" for event in place.events())


OVER_GLOO = (
    "import torch; from tests.methods import gloo_for_nccl; from rlhf_nb.training.rollout import choose, vllm_nccl\n"
    "choose.NCCLTransfer = lambda server, device: vllm_nccl.NCCLTransfer(server, torch.device('cuda'))\n"
)


def test_whole_models_go_over_a_group_of_processes_where_nccl_is_asked_for(python, model, job, tmp_path):
    """gloo has NCCL's place here, at both ends; what is said around it, and what arrives, are vLLM's and ours."""
    job.model = model
    flags = ("--weight-transfer-config", '{"backend": "nccl"}')
    extension = ("--worker-extension-cls", "tests.methods.gloo_for_nccl.Extension")
    with serving(python, model, tmp_path, *flags, *extension, VLLM_SERVER_DEV_MODE="1") as url:
        config = {**CONFIG, "rollout_backend": "vllm_server", "vllm_url": url, "vllm_transfer": "nccl"}
        place = job.prepare("ppo", ROWS, config=config, reward=LETTERS)
        done = subprocess.run(
            [python, "-c", OVER_GLOO + JOB, str(place.path)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        check(place, corrected=False)
        assert not (place.path / "sampler").exists()


def test_a_server_that_takes_no_weights_over_nccl_is_told_how_to_start(url):
    with closing(Server(url, ends={1}, adapter=None)) as engine:
        transfer = object.__new__(NCCLTransfer)
        transfer.server = engine
        with pytest.raises(ComputeError, match=r"takes no weights over NCCL; start it with .*--weight-transfer-config"):
            transfer._refuse_a_server_without_it()


def test_nccl_where_it_cannot_be_is_refused_in_one_line(job):
    def spec(adapter: Any = None, **knobs: Any) -> Any:
        return job.prepare("ppo", ROWS, config={**CONFIG, **knobs}, reward=LETTERS, adapter=adapter).spec()

    with pytest.raises(SpecError, match="there is rollout_backend=transformers; leave it out"):
        PPO(vllm_transfer="nccl").check(spec())
    server = {"rollout_backend": "vllm_server", "vllm_url": "http://127.0.0.1:9", "vllm_transfer": "nccl"}
    with pytest.raises(SpecError, match="there is an adapter; leave it out"):
        PPO(**server).check(spec(LoRA(r=4)))
    with pytest.raises(SpecError, match="the trainer's is cpu; use vllm_transfer=disk"):
        NCCLTransfer(None, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r'install "rlhf-nb\[vllm\]" there, or use vllm_transfer=disk'):
        NCCLTransfer(None, torch.device("cuda"))  # type: ignore[arg-type]


class Old(BaseHTTPRequestHandler):
    """A server that was started without the switches: it answers as vLLM 0.32 then does."""

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "start"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/completions":
            self.answer(404, {"error": {"message": "The model `policy` does not exist.", "code": 404}})
        else:
            self.answer(404, {"detail": "Not Found"})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_without_the_switches_says_which_and_one_that_is_gone_says_so():
    with ThreadingHTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with closing(Server(url, ends={1}, adapter=None)) as engine, pytest.raises(ComputeError, match="DEV_MODE=1"):
            engine.load_weights(ROOT)
        with closing(Server(url, ends={1}, adapter="policy")) as engine:
            with pytest.raises(ComputeError, match=r"RUNTIME_LORA_UPDATING=True and --enable-lora"):
                engine.load_adapter(ROOT)
            with pytest.raises(ComputeError, match=r"was refused \(404\): The model `policy` does not exist"):
                engine.sample([[5]], [0], temperature=1.0, limit=2)
        server.shutdown()
    with pytest.raises(ComputeError, match="no answer to /v1/models"):
        Server(url, ends={1}, adapter=None)


class Hurried(BaseHTTPRequestHandler):
    """Ends its connections after one answer without saying so, as a server does at the end of its patience."""

    protocol_version = "HTTP/1.1"
    answered = False

    def do_GET(self, status: int = 200) -> None:
        if self.answered:
            self.close_connection = True
            return
        data = json.dumps({"data": [{"id": "policy"}], "world_size": 1, "message": "no init_info"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.answered = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET(500)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_request_after_a_pause_does_not_meet_a_connection_that_the_server_is_ending():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hurried) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with closing(Server(f"http://127.0.0.1:{server.server_port}", ends={1}, adapter=None)) as engine:
            time.sleep(2)
            assert engine.asked("GET", "/get_world_size")["world_size"] == 1
        server.shutdown()


def test_a_request_after_an_error_does_not_meet_the_connection_on_which_the_server_fell():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hurried) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with closing(Server(f"http://127.0.0.1:{server.server_port}", ends={1}, adapter=None)) as engine:
            time.sleep(2)
            transfer = object.__new__(NCCLTransfer)
            transfer.server = engine
            transfer._refuse_a_server_without_it()
            assert engine.asked("GET", "/get_world_size")["world_size"] == 1
        server.shutdown()


# --- in the trainer's process -----------------------------------------------------------------------------------------


def test_every_adapter_that_is_loaded_is_another_one_and_no_prefix_stays_cached(monkeypatch):
    """After a run went back to its checkpoint the same step comes again with other weights."""
    asked = SimpleNamespace(LoRARequest=lambda name, number, path: (name, number))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", asked)
    engine, resets = object.__new__(InProcess), []
    engine.llm = SimpleNamespace(reset_prefix_cache=lambda: resets.append(engine.adapter))
    engine._adapters, loaded = 0, []
    for _ in range(3):
        engine.load_adapter(ROOT)
        loaded.append(engine.adapter)
    assert len({name for name, _ in loaded}) == 3 and [number for _, number in loaded] == [1, 2, 3]
    assert resets == loaded


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_ppo_trains_with_an_engine_in_its_own_process(python, model, job, adapter):
    job.model = model
    config = {**CONFIG, "rollout_backend": "vllm", "vllm_memory": 0.1}
    place = job.prepare("ppo", ROWS, config=config, reward=LETTERS, adapter=adapter)
    done = subprocess.run(
        [python, "-c", JOB, str(place.path)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(place, corrected=False)


def test_an_exported_model_completes_in_vllm_as_it_does_in_transformers(python, model, job, tmp_path):
    from rlhf_nb.toy import demonstrations

    # Sure of every token: vLLM draws at 0.01 where less is asked for, and a random model's logits lie close together.
    sharp = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        sharp.lm_head.weight *= 100
    job.model = shutil.copytree(model, tmp_path / "sharp")
    sharp.save_pretrained(job.model)
    learns = {"max_steps": 2, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2, "max_length": 120}
    tuned = job("sft", demonstrations(8), name="sft-1", config=learns, adapter=LoRA(r=4))
    out = tmp_path / "exported"
    export.write(export.Source(tuned.model, tuned.model / "adapter"), out, form="merged", card="# polite")
    config = {"n": 2, "temperature": 0.01, "max_new_tokens": 8, "batch_size": 8}
    policy = PathModel(path=str(out))
    ours = job("generate", ROWS[:4], name="ours", config=config, policy=policy)
    theirs = job.prepare(
        "generate",
        ROWS[:4],
        name="theirs",
        config={**config, "rollout_backend": "vllm", "vllm_memory": 0.1},
        policy=policy,
    )
    done = subprocess.run(
        [python, "-c", JOB, str(theirs.path)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = decode_rows(theirs.rows_path.read_bytes())
    assert said == decode_rows(ours.rows_path.read_bytes())
    assert len({row["completions"][0] for row in said}) > 1


def test_without_vllm_the_choice_is_refused_in_one_line(job):
    with pytest.raises(SpecError, match=r'rollout_backend=vllm: .*install "rlhf-nb\[vllm\]"'):
        job("generate", ROWS, name="generate-1", config={"rollout_backend": "vllm"})
    with pytest.raises(SpecError, match=r'rollout_backend=vllm: .*install "rlhf-nb\[vllm\]"'):
        job("ppo", ROWS, config={**CONFIG, "rollout_backend": "vllm"}, reward=LETTERS)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "http://example.org", "https://0.0.0.0:1"])
def test_only_this_machine_is_taken(url):
    with pytest.raises(SpecError, match="is not this machine"):
        loopback(url)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://127.0.0.1"])
def test_what_is_no_url_is_refused(url, job):
    with pytest.raises(SpecError, match="is no http URL"):
        PPO(rollout_backend="vllm_server", vllm_url=url).check(
            job.prepare("ppo", ROWS, config=CONFIG, reward=LETTERS).spec()
        )
    assert loopback("http://[::1]:8000/v1/") == "http://[::1]:8000"


def test_a_rank_is_rounded_up_to_one_that_vllm_takes():
    assert [rank_for(r) for r in (1, 4, 16, 33)] == [1, 8, 16, 64]
    with pytest.raises(SpecError, match="ranks up to 512"):
        rank_for(513)


def test_an_engine_for_one_process_is_not_shared_by_two(job):
    from rlhf_nb.protocol.spec import Launch

    spec = job.prepare("ppo", ROWS, config=CONFIG, reward=LETTERS, launch=Launch(flags=("--num_processes", "2"))).spec()
    with pytest.raises(SpecError, match="use rollout_backend=vllm_server"):
        PPO(rollout_backend="vllm").check(spec)
