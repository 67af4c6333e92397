"""Vowel signs by arabic-diacritizer."""

from __future__ import annotations

import torch

from benchmarks.models.job import Job, Model, Results, Swap, load

# Article 1 of the Universal Declaration of Human Rights.
_ARABIC = (
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق",
    "وقد وهبوا عقلا وضميرا",
    "وعليهم أن يعامل بعضهم بعضا بروح الإخاء",
)


def _diacritizer(swap: Swap) -> Job:
    model = load("diacritize").BiLSTMDiacritizer.from_pretrained()
    swap(model)
    ids = torch.tensor([model.tokenizer.encode(_ARABIC[0], add_special=False)])

    def read() -> Results:
        text = "\n".join(model.diacritize(line) for line in _ARABIC)
        with torch.no_grad():
            return {"text": text, "logits": model(ids)}

    return read


MODELS = (
    Model(
        "Arabic diacritizer",
        {"diacritize": "arabic-diacritizer"},
        "vowel signs of 3 sentences, own weights",
        "inference",
        _diacritizer,
    ),
)
