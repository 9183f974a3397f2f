#!/usr/bin/env python3
"""A tokenizer of the real models' size, to measure with: tests/bench/large_vocabulary.py DIRECTORY

Ling 2.0 has 156,891 byte-level BPE tokens and 262 added ones. This makes as many out of the demo model's 4,048: words put
together from its pieces, with and without a blank, a capital or all of them, and Chinese characters, pairs and triples. The
words mean nothing; how many tokens begin alike, and how long they are, is about what a large vocabulary has.
"""

import json
import pathlib
import random
import sys

DEMO = pathlib.Path(__file__).resolve().parents[2] / "deploy/models/ling-tiny"
BASE, ADDED = 156_891, 262
CHARACTERS, PAIRS, TRIPLES = 7_000, 42_000, 8_000


def alphabet():
    """GPT-2's: a printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in plain else next(others)) for byte in range(256)}


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    added = tokenizer["added_tokens"]
    for token in added:
        vocab.pop(token["content"], None)
    assert sorted(vocab.values()) == list(range(len(vocab)))
    dice = random.Random(157_184)

    def merge(left, right):
        token = left + right
        if token in vocab or len(vocab) >= BASE:
            return token
        vocab[token] = len(vocab)
        merges.append([left, right])
        return token

    of_byte = alphabet()
    characters = []
    for code in range(0x4E00, 0x4E00 + CHARACTERS):
        first, second, third = (of_byte[byte] for byte in chr(code).encode())
        characters.append(merge(merge(first, second), third))
    common = lambda words: words[int(len(words) * dice.random() ** 2)]  # noqa: E731
    pairs = [merge(common(characters), common(characters)) for _ in range(PAIRS)]
    for _ in range(TRIPLES):
        merge(common(pairs), common(characters))

    inner = [token for token in vocab if token.isascii() and token.isalpha() and token.islower()]
    starts = [token for token in vocab if token.isascii() and token.isalpha()] + [
        token for token in vocab if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()]
    while len(vocab) < BASE:
        word = merge(dice.choice(starts), dice.choice(inner))
        if len(word) < 14 and dice.random() < 0.5:
            starts.append(word)

    names = [token["content"] for token in added]
    names += [f"<|added_{i}|>" for i in range(ADDED - len(names))]
    tokenizer["added_tokens"] = [{**added[0], "id": BASE + i, "content": name} for i, name in enumerate(names)]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        (out / name).write_bytes((DEMO / name).read_bytes())
    print(f"{len(vocab)} + {len(names)} tokens in {out}")


if __name__ == "__main__":
    main()
