#!/usr/bin/env python3
"""Perplexity of a checkpoint on its held-out answers, and the error of its logits, for each weight format.

    MILLRACE_PROBE=build/release/tests/engine/engine_probe build/venv/bin/python tests/parity/quality.py [CONVERSATIONS]

CONVERSATIONS are taken evenly from the file, which is in parts; all without it. Teacher-forced: the loss of the tokens of each conversation's last message, given all before. Logits errors are against the
same engine in float32: largest absolute difference over largest absolute logit, per row.
"""

import json
import os
import pathlib
import sys

import numpy as np

from conftest import Probe

MODEL = pathlib.Path(__file__).parents[2] / "deploy/models/ling-tiny"
FORMATS = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "int4")]


def conversations(probe, count):
    """(token ids, index of the first answer token) of each conversation."""
    lines = (MODEL / "heldout.jsonl").read_text().splitlines()
    for line in lines[:: max(1, len(lines) // count) if count else 1]:
        messages = json.loads(line)["messages"]
        prompt = probe.must(op="render", messages=messages[:-1])["text"]
        whole = probe.must(op="render", messages=messages, add_generation_prompt=False)["text"]
        ids = probe.must(op="tokenize", text=whole)["ids"]
        yield ids, len(probe.must(op="tokenize", text=prompt)["ids"])


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else None
    probe = Probe(os.environ["MILLRACE_PROBE"])
    probe.must(op="load_tokenizer", directory=str(MODEL))
    cases = list(conversations(probe, count))
    reference, first_loss = [], None
    print("format            perplexity   loss change   logits error, median / 99 %")
    for precision, quantize in FORMATS:
        probe.must(op="load", directory=str(MODEL), precision=precision, quantize=quantize, threads=2)
        losses, errors = [], []
        for index, (ids, start) in enumerate(cases):
            segment = {"tokens": ids[:-1], "position": 0, "num_logits": len(ids) - start}
            logits = np.array(probe.must(op="forward", segments=[segment])["logits"], dtype=np.float64)
            shifted = logits - logits.max(axis=1, keepdims=True)
            chosen = shifted[np.arange(len(logits)), ids[start:]]
            losses += list(np.log(np.exp(shifted).sum(axis=1)) - chosen)
            if precision == "float32":
                reference.append(logits.astype(np.float32))
            else:
                errors += list(np.abs(logits - reference[index]).max(axis=1) / np.abs(reference[index]).max(axis=1))
        loss = np.mean(losses)
        first_loss = loss if first_loss is None else first_loss
        name = precision if quantize == "none" else quantize
        spread = f"{np.median(errors):.4f} / {np.quantile(errors, 0.99):.4f}" if errors else "reference"
        print(f"{name:16} {np.exp(loss):11.4f} {loss - first_loss:+11.4f} nat   {spread}   ({len(losses)} tokens)",
              flush=True)
    probe.close()


if __name__ == "__main__":
    main()
