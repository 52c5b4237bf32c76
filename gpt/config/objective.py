"""What a run learns: next tokens, preferences, or a reward."""

import re
from dataclasses import dataclass
from typing import Literal

from gpt.config.checks import UsageError, check, number, quoted

ObjectiveKind = Literal["next_token", "dpo", "reward"]
Baseline = Literal["leave_one_out", "group", "none"]
READY_REWARDS = ("bleu", "regex", "length")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a run learns. dpo and reward start from the model init, and data.source is a JSONL file
    of records. A text that is learned ends with end-of-text.
    """

    kind: ObjectiveKind = "next_token"
    """next_token: the next tokens of a text; dpo: to prefer "chosen" to "rejected" after "prompt"
    (arXiv:2305.18290); reward: to write texts after "prompt" that get high rewards
    (policy gradients)."""
    distill: str = ""
    """next_token: models to learn from, named as for sample.py, with commas between them. The run
    learns their averaged probabilities of the next token as well (arXiv:1503.02531)."""
    distill_weight: float = number(0.5, above=0, at_most=1)
    """distill: weight of the divergence from these probabilities; the text's own next token has the
    rest."""
    distill_temperature: float = number(1.0, above=0)
    """distill: divides the logits of all models in the divergence, which is multiplied by its
    square."""
    records: int = number(16, at_least=1)
    """dpo, reward: pairs of texts, or prompts, in a step, over all processes."""
    beta: float = number(0.1, above=0)
    """dpo: how strongly the model is held to the start model; lower allows larger changes."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """dpo: the probability that a preference in the records is wrong."""
    chosen_weight: float = number(0.0, at_least=0)
    """dpo: weight of the cross-entropy of the chosen texts, per token, which is added to the loss
    (arXiv:2404.19733). It keeps them likely: the preferences alone can make both texts unlikely."""
    reward: str = ""
    """reward: file.py:function, a function of prompt, text and record that returns a number; or
    bleu: against the record's "reference" or "references", from 0 to 1; regex: 1 if the text has a
    match of pattern, else 0; length: 1 at length characters, less the further away."""
    pattern: str = ""
    """reward regex: the regular expression."""
    length: int = number(100, at_least=1)
    """reward length: the number of characters that gets the reward 1."""
    samples: int = number(4, at_least=1)
    """reward: texts written for each prompt."""
    baseline: Baseline = "leave_one_out"
    """reward: what is subtracted from a text's reward. leave_one_out: the mean reward of the
    prompt's other texts (RLOO, arXiv:2402.14740); group: the mean of all its texts, and the
    difference is divided by their standard deviation (GRPO, arXiv:2402.03300); none: nothing."""
    updates: int = number(1, at_least=1)
    """reward: steps that learn from the same texts."""
    clip: float = number(0.2, at_least=0)
    """reward: with several updates, the probability of a token counts only up to this fraction
    above or below its first one (PPO's and GRPO's form, arXiv:1707.06347); 0: no limit."""
    kl: float = number(0.0, at_least=0)
    """reward: weight of the Kullback-Leibler divergence from the start model, whose weights are
    then in memory too; 0: none."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of each token, estimated without bias and with low variance (k3: Schulman,
    Approximating KL Divergence); reward: the log-ratio of the whole text is subtracted from its
    reward."""
    by_length: bool = False
    """reward: divide each text's loss by its number of tokens, as GRPO does. The gradient is then
    not exactly that of the mean reward."""
    temperature: float = number(1.0, at_least=0.01)
    """reward: divides the logits when texts are written, and in the loss."""
    max_new_tokens: int = number(64, at_least=1)
    """reward: maximum number of tokens in a text."""
    stop: tuple[str, ...] = ()
    r"""reward: one or more texts that end a text; \n is a newline."""

    def __post_init__(self) -> None:
        check(self, "objective.")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise UsageError("objective.stop has an empty text; each must have a character or more")
        if self.distill and self.kind != "next_token":
            raise UsageError(
                f"objective.distill is {quoted(self.distill)}, and needs objective.kind next_token "
                f"(it is {self.kind})"
            )
        if self.distill and not all(self.teachers):
            raise UsageError(
                f"objective.distill is {quoted(self.distill)}, and must be one or more models with "
                "commas between them"
            )
        if self.kind != "reward":
            return
        name, _, function = self.reward.rpartition(":")
        if self.reward not in READY_REWARDS and not (
            name.endswith(".py") and function.isidentifier()
        ):
            ready = ", ".join(READY_REWARDS)
            raise UsageError(
                f"objective.reward is {quoted(self.reward)}, and must be file.py:function or one "
                f"of {ready}"
            )
        if self.reward == "regex":
            self._check_pattern()
        if self.baseline != "none" and self.samples < 2:
            raise UsageError(
                f"objective.samples is {self.samples}, and objective.baseline "
                f"{self.baseline} needs at least 2 texts for each prompt"
            )

    @property
    def teachers(self) -> list[str]:
        """The models of ``distill``."""
        return [name.strip() for name in self.distill.split(",")] if self.distill else []

    def _check_pattern(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(
                f"objective.pattern is {quoted(self.pattern)}, which is not a regular expression: "
                f"{error}"
            ) from None
        if not self.pattern:
            raise UsageError(
                "objective.pattern is empty, and objective.reward regex needs a regular expression"
            )
