"""Several rewards, pretraining rows and another reward in flight, as they are typed and on real workers."""

from __future__ import annotations

import pytest

from rlhf_nb import workspace
from rlhf_nb.errors import NotFoundError, RunFailedError, SpecError

FUNCTION = "def {name}(prompts, completions, **columns):\n    return [{value} for text in completions]"
START = (
    "run = %rlhf ppo --policy {model} --prompts toy-prompts --reward letters=1,toy-true=0.5 "
    "--pretraining toy-demonstrations --set ptx_coef=0.1 max_steps=400 rollout_batch_size=4 batch_size=4 "
    "max_new_tokens=8 max_length=120 sample_every=0 num_ppo_epochs=1"
)


def keep_rewards(shell) -> None:
    for name, value in {"letters": "float(len(text))", "vowels": "10.0 + len(text)"}.items():
        shell.shell.run_cell_magic("rlhf", f"reward-function {name}", FUNCTION.format(name=name, value=value))


@pytest.mark.slow
def test_weights_and_the_reward_itself_are_moved_while_a_run_trains(shell, tiny_model_maker):
    keep_rewards(shell)
    shell.run("%rlhf attach local --no-standby")
    shell.run(START.format(model=tiny_model_maker("still", dropout=0.0)))
    ws = workspace.current()
    run = ws.run("ppo-1")
    try:
        assert run.spec.title.endswith("→ letters + toy-true")
        assert run.wait(timeout=120, step=2).state == "running" and run.fold.step >= 2
        said = shell.run("%rlhf set ppo-1 reward_weight/letters=0.25 --why 'length is cheap'")
        assert "reward_weight/letters 1 → 0.25 at step" in str(said)
        assert "reward/letters=" in shell.complete("%rlhf set ppo-1 reward/l")
        said = str(shell.run("%rlhf set ppo-1 reward/letters=vowels"))
        assert said.startswith("reward letters: letters → vowels at step ") and "\n" not in said
        (change,) = run.fold.rewards
        assert (change.part, change.old, change.new.name) == ("letters", "letters", "vowels")
        with pytest.raises(SpecError, match=r"its reward has several parts; set reward/NAME, NAME one of letters"):
            shell.run("%rlhf set ppo-1 reward=vowels")
        with pytest.raises(NotFoundError, match=r'"vowel" does not exist in this workspace.*did you mean "vowels"'):
            shell.run("%rlhf set ppo-1 reward/letters=vowel")
    finally:
        shell.run("%rlhf stop ppo-1\n%rlhf wait ppo-1")
    row = run.fold.table()[-2]
    assert {"reward_part/letters", "reward_part/toy-true", "reward/disagreement"} <= {
        name for one in run.fold.rows for name in one.values
    }, row
    assert any(row.values.get("loss/pretraining") for row in run.fold.rows)
    audited = {one.action: one.detail for one in ws.store.audit() if one.subject == "ppo-1"}
    assert audited["coefficient_changed"]["why"] == "length is cheap" and audited["reward_replaced"]["old"] == "letters"


@pytest.mark.slow
def test_a_reward_that_never_answers_ends_the_run_at_its_limit(shell, tiny_model_maker):
    """The limit is an alarm, heard by a worker's main thread only: it holds because jobs run there."""
    sleeps = "import time\ndef asleep(prompts, completions, **columns):\n    time.sleep(1e6)"
    shell.shell.run_cell_magic("rlhf", "reward-function asleep", sleeps)
    shell.run("%rlhf attach local --no-standby")
    shell.run(
        f"run = %rlhf ppo --policy {tiny_model_maker('still')} --prompts toy-prompts --reward asleep --set "
        "reward_timeout=1 rollout_batch_size=4 batch_size=4 max_new_tokens=8 max_length=120 sample_every=0"
    )
    said = r"^ppo-1 failed: reward asleep: no answer within reward_timeout=1 s; make it faster or raise the limit$"
    with pytest.raises(RunFailedError, match=said):
        workspace.current().run("ppo-1").wait(timeout=120, step=5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--reward toy-true,toy-true", "reward toy-true is named twice; name it once, with the sum of the weights"),
        ("--reward letters=x,toy-true", "reward letters='x': a weight is one finite number; write letters=0.5"),
        ("--reward toy-true=2", "one reward needs no weight; score_scale multiplies its scores"),
        ("--reward toy-true --gold letters,toy-true", "one reward is plotted as the true one; give one"),
        ("--reward toy-true --set combine_rewards=min", "combine_rewards=min needs several rewards and there is one"),
        ("--reward toy-true --set ptx_coef=1", "ptx_coef=1 and no rows to keep up; give pretraining=, demonstrations"),
        ("--reward toy-true --set preference_references=2 reference=none", "use reference=frozen"),
    ],
)
def test_a_reward_that_cannot_be_meant_is_one_line(shell, words, says):
    keep_rewards(shell)
    with pytest.raises(SpecError) as caught:
        shell.run(f"%rlhf ppo --policy toy-sft --prompts toy-prompts {words}")
    assert says in str(caught.value) and "\n" not in str(caught.value)
