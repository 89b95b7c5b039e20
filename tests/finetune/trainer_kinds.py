"""The matrix of Trainers: one row each, with a tiny model, tokenizer and data, as people set them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

STEPS, BATCH, LENGTH = 4, 4, 48
TEXTS = [f"the number {i} comes after {i - 1} and before {i + 1} " * (1 + i % 3) for i in range(1, 41)]
ROLES = "user assistant system"
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> "
    "{% endgeneration %}{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}"
)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the texts, and a chat template that marks what the assistant says."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "<s>", "</s>"]
    words.train_from_iterator([*TEXTS, ROLES], trainers.WordLevelTrainer(special_tokens=special))
    named = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.chat_template = CHAT
    return tokenizer


def sizes(**options: Any) -> dict[str, Any]:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return layers | {"vocab_size": len(word_tokenizer()), "max_position_embeddings": 128} | options


def llama(kind: Any = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return kind(LlamaConfig(**sizes(num_key_value_heads=2), **special, **options))


def _bert(kind: Any = BertForSequenceClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(**sizes(), pad_token_id=1, **options)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["bert.pooler.dense"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(kind(config), lora)


def _settings(**options: Any) -> dict[str, Any]:
    return {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | options


LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def reviews() -> DatasetDict:
    """The texts as reviews with verdicts, in the form of the packaged data sets."""
    rows = Dataset.from_list([{"text": text, "label": number % 2} for number, text in enumerate(TEXTS * 6)])
    return DatasetDict(train=rows, validation=rows)


# TRL ------------------------------------------------------------------------------------------------------------------


def conversations() -> Dataset:
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": "after"}, {"role": "assistant", "content": x}]} for x in TEXTS]
    )


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": "after ", "completion": text} for text in TEXTS])


def pairs() -> Dataset:
    rows = [{"chosen": text, "rejected": " ".join(text.split()[::-1])} for text in TEXTS]
    return Dataset.from_list([{"prompt": "after the number ", **row} for row in rows])


def _trl(kind: str, folder: Path, data: Dataset, options: dict[str, Any], base: Any = None, **lora: Any) -> Trainer:
    """One of TRL's Trainers by the beginning of its name."""
    import trl

    args = getattr(trl, f"{kind}Config")(str(folder), **_settings(max_length=LENGTH) | options)
    more = {"processing_class": word_tokenizer(), "peft_config": LoraConfig(**LORA, **lora)}
    trainer: Trainer = getattr(trl, f"{kind}Trainer")(base or llama(), args=args, train_dataset=data, **more)
    return trainer


def sft(folder: Path, data: Dataset | None = None, **options: Any) -> Trainer:
    """TRL's SFTTrainer on conversations, or on other data."""
    return _trl("SFT", folder, conversations() if data is None else data, options)


def dpo(folder: Path, **options: Any) -> Trainer:
    return _trl("DPO", folder, pairs(), options)


def kto(folder: Path, prompts: Sequence[str] = ("after ",), answers: Sequence[str] = TEXTS, **options: Any) -> Trainer:
    texts = zip(cycle(prompts), answers, strict=False)
    rows = [{"prompt": one, "completion": other, "label": row % 2 == 0} for row, (one, other) in enumerate(texts)]
    return _trl("KTO", folder, Dataset.from_list(rows), options)


def reward(folder: Path, **options: Any) -> Trainer:
    base = llama(LlamaForSequenceClassification, num_labels=1)
    return _trl("Reward", folder, pairs(), options, base, task_type="SEQ_CLS")


def rollouts(kind: str, folder: Path, rank: int = 8, **options: Any) -> Trainer:
    """TRL's GRPOTrainer or RLOOTrainer, by the beginning of its name, with a reward for few letters."""
    import trl

    def brief(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    settings = _settings(num_generations=2, max_completion_length=12, bf16=False) | options
    trainer: Trainer = getattr(trl, f"{kind}Trainer")(
        llama(),
        reward_funcs=brief,
        args=getattr(trl, f"{kind}Config")(str(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": " ".join(TEXTS[number].split()[:-2])} for number in range(8)]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(**LORA | {"r": rank}),
    )
    return trainer


# transformers ---------------------------------------------------------------------------------------------------------


class ClassWeights(Trainer):  # type: ignore[misc]
    """Weighs the classes in its loss, as imbalanced data need."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 5.0])
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


def _encoded(labels: Callable[[int, int], Any]) -> Dataset:
    """The texts as tokens; labels of the number of a text and its length."""
    tokens = word_tokenizer()(TEXTS, truncation=True, max_length=LENGTH, return_token_type_ids=False)
    rows = [labels(number, len(ids)) for number, ids in enumerate(tokens["input_ids"])]
    return Dataset.from_dict({**tokens, "labels": rows})


def _trainer(model: Any, data: Dataset, folder: Path, options: dict[str, Any], kind: Any = Trainer, **more: Any) -> Any:
    collator = more.pop("data_collator", None) or DataCollatorWithPadding(word_tokenizer())
    args = more.pop("arguments", TrainingArguments)(str(folder), **_settings() | options)
    return kind(model, args, train_dataset=data, data_collator=collator, **more)


def classification(folder: Path, kind: Any = Trainer, callbacks: Any = None, **options: Any) -> Trainer:
    """A Trainer of some class that sorts the texts into three classes."""
    data = _encoded(lambda i, _: i % 3)
    return _trainer(_bert(num_labels=3), data, folder, options, kind, callbacks=callbacks)


def regression(folder: Path, **options: Any) -> Trainer:
    return _trainer(_bert(num_labels=1), _encoded(lambda i, _: i / 40), folder, options)


def multi_label(folder: Path, **options: Any) -> Trainer:
    model = _bert(num_labels=3, problem_type="multi_label_classification")
    return _trainer(model, _encoded(lambda i, _: [float(i >> bit & 1) for bit in range(3)]), folder, options)


def token_classification(folder: Path, **options: Any) -> Trainer:
    collator = DataCollatorForTokenClassification(word_tokenizer())
    data = _encoded(lambda i, length: [(i + place) % 3 for place in range(length)])
    return _trainer(_bert(BertForTokenClassification, num_labels=3), data, folder, options, data_collator=collator)


def seq2seq(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 1, "eos_token_id": 3, "decoder_start_token_id": 1}
    base = T5ForConditionalGeneration(T5Config(vocab_size=len(word_tokenizer()), **sizes, **special))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "k", "v", "o", "wi", "wo"]))
    data = _encoded(lambda i, length: [4 + i % 20] * min(length, 12))
    collator = DataCollatorForSeq2Seq(word_tokenizer(), model=base)
    more = {"arguments": Seq2SeqTrainingArguments, "data_collator": collator}
    return _trainer(model, data, folder, options, Seq2SeqTrainer, **more)


@dataclass(frozen=True)
class TrainerKind:
    """One row of the matrix.

    Attributes:
        name: shown in the test's id.
        build: makes the Trainer, from a folder and options of its arguments.
        typical_error: the median share by which measured peaks may differ from predicted ones.
        largest_error: the same for the largest share.
    """

    name: str
    build: Callable[..., Trainer]
    typical_error: float = 0.0055  # the margin of checkpointing, and copies of rows
    largest_error: float = 0.03


TRL_KINDS = (
    TrainerKind("sft-messages", sft),
    TrainerKind("sft-assistant-only", partial(sft, assistant_only_loss=True)),
    TrainerKind("sft-completions", lambda folder, **options: sft(folder, completions(), **options)),
    # A batch is one row, whose memory is told from rows of half its length: three tokens too many, of 184.
    TrainerKind("sft-packing", partial(sft, packing=True), 0.02),
    TrainerKind("sft-no-checkpointing", partial(sft, gradient_checkpointing=False)),
    TrainerKind("dpo", dpo),
    TrainerKind("kto", kto),
    # The margin is rounded up to a byte for each rank, which counts where a step takes so little.
    TrainerKind("reward", reward, 0.006),
)

TRAINER_KINDS = (
    TrainerKind("class-weights", partial(classification, kind=ClassWeights)),
    TrainerKind("label-smoothing", partial(classification, label_smoothing_factor=0.1)),
    TrainerKind("neftune", partial(classification, neftune_noise_alpha=5.0)),
    TrainerKind("regression", regression),
    TrainerKind("multi-label", multi_label),
    TrainerKind("token-classification", token_classification),
    TrainerKind("seq2seq", seq2seq),
)
