"""The options of `memdec build`, checked before anything is made."""

from dataclasses import asdict, dataclass, field, fields

from memdec.decoders.knn_targets import KINDS
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.train import Schedule

LEAST_ENTRIES = 2_000  # more than the longest training window, 1,025 tokens with its last label
LOSSES = ("knn", "mixture", "labels")
MAY_BE_ZERO = ("seed", "teacher_tokens", "min_count", "validate_every")
ONLY_KNN = ("teacher_tokens", "neighbours", "targets", "beta", "ngram_targets")  # without effect on a build with another loss
ONLY_INIT = ("init_layers", "learning_rate", "min_count")  # without effect on a student with fresh weights


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build; the field names are the flags."""

    teacher_tokens: int = field(default=1_000_000, metadata={"help": "tokens that tune the teacher on the domain; 0: it is used as it is"})
    entries: int = field(
        default=1_500_000, metadata={"help": "datastore entries at most; with --loss mixture, tokens whose base probability is computed"}
    )
    neighbours: int = field(default=256, metadata={"help": "largest k tried: how many neighbours a kNN distribution is made of"})
    student_tokens: int = field(default=3_000_000, metadata={"help": "decoder training on the labels alone, tokens"})
    knn_tokens: int = field(default=1_500_000, metadata={"help": "decoder training on the kNN targets, or what --loss says, tokens"})
    targets: str = field(
        default="knn-lm", metadata={"help": "what is imitated: knn-lm, neighbours and teacher mixed, or knn, the neighbours alone"}
    )
    beta: float = field(default=0.5, metadata={"help": "weight of the kNN term in the loss (paper, eq. 6)"})
    ngram_targets: float = field(
        default=0.0, metadata={"help": "weight in the targets of what the n-gram memory says, each position's own occurrence left out"}
    )
    loss: str = field(
        default="knn",
        metadata={
            "help": "what the second phase of training is on: knn, the targets; mixture, the loss of the mixture with the base; or labels"
        },
    )
    mixture_lambda: float = field(default=0.3, metadata={"help": "lambda of the mixture that --loss mixture trains"})
    init_layers: str = field(
        default="all", metadata={"help": "layers taken from --init: all, their numbers (0,1,2,29), or N: the first N - 1 and the last"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of a decoder that starts from --init (AdamW)"})
    min_count: int = field(
        default=0, metadata={"help": "the memory predicts only tokens that occur so often in the training text; 0: all (with --init)"}
    )
    validate_every: int = field(default=0, metadata={"help": "measure a learning curve on the validation split every so many tokens"})
    no_ngram: bool = field(default=False, metadata={"help": "make no n-gram memory in passing; without, it goes to OUT.ngram"})
    with_sources: bool = field(
        default=False, metadata={"help": "let answers name the documents that the n-gram memory's continuations come from"}
    )
    seed: int = field(default=0, metadata={"help": "seed of weights and order"})
    licence: str = field(default="not stated", metadata={"help": "licence of the corpus's text, recorded in the package"})

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < (name not in MAY_BE_ZERO):
                wanted = "0 or above" if name in MAY_BE_ZERO else "above 0"
                raise OptionError(f"{flag(name)} {value}: wanted a whole number{', ' if name in MAY_BE_ZERO else ' '}{wanted}")
        if self.entries < LEAST_ENTRIES:
            raise OptionError(f"--entries {self.entries}: wanted at least {LEAST_ENTRIES:,}")
        if not 0 <= self.beta <= 1:
            raise OptionError(f"--beta {self.beta}: wanted a number from 0 to 1")
        if not 0 <= self.ngram_targets <= 1:
            raise OptionError(f"--ngram-targets {self.ngram_targets}: wanted a number from 0 to 1")
        if not 0 < self.mixture_lambda < 1:
            raise OptionError(f"--mixture-lambda {self.mixture_lambda}: wanted a number between 0 and 1")
        if not 0 < self.learning_rate <= 1:
            raise OptionError(f"--learning-rate {self.learning_rate}: wanted a number above 0, up to 1")
        for name, known in {"targets": KINDS, "loss": LOSSES}.items():
            if getattr(self, name) not in known:
                raise OptionError(f"{flag(name)} {getattr(self, name)}: wanted {' or '.join(known)}")
        if self.loss != "knn":
            self.refuse(ONLY_KNN, f"--loss {self.loss} has no datastore")
        if self.loss == "labels":
            self.refuse(("entries",), "--loss labels takes all of the training text")
        if self.no_ngram:
            self.refuse(("with_sources", "ngram_targets"), "--no-ngram makes no n-gram memory")
        if self.loss != "mixture":
            self.refuse(("mixture_lambda",), "only --loss mixture has it")

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise OptionError if one of these options, which would have no effect, isn't at its default."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                given = flag(name) if value is True else f"{flag(name)} {value}"
                raise OptionError(f"{given}: would have no effect; {why}")

    def teacher_schedule(self) -> Schedule:
        """Schedule of the teacher: small batches, because in a short training more steps help more than less noisy gradients."""
        return Schedule(self.teacher_tokens, batch=4, seed=self.seed, matrix_lr=0.01, other_lr=2e-3, stretched=0.0)

    def student_schedule(self, pretrained: bool) -> Schedule:
        """Schedule of the student: a short cooldown, because the second phase cools down again, for longer."""
        if pretrained:
            return self._gentle(self.student_tokens, self.seed, 0.2)
        return Schedule(self.student_tokens, batch=4, seed=self.seed, cooldown=0.2)

    def knn_schedule(self, pretrained: bool) -> Schedule:
        """Schedule of the second phase: of the decoder, and of the control that is trained on the labels alone."""
        if pretrained:
            return self._gentle(self.knn_tokens, self.seed + 1, 0.9)
        return Schedule(self.knn_tokens, batch=8, seed=self.seed + 1, cooldown=0.9)

    def _gentle(self, tokens: int, seed: int, cooldown: float) -> Schedule:
        """A schedule for pretrained weights: AdamW for all, and no windows longer than those that the model knows anyway."""
        return Schedule(tokens, batch=4, seed=seed, cooldown=cooldown, stretched=0.0, matrix_lr=0.0, other_lr=self.learning_rate)


def flag(name: str) -> str:
    """An option's name as it is written on a command line."""
    return f"--{name.replace('_', '-')}"
