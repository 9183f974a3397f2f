"""The tokenizer against the `tokenizers` package, on the demo model's own tokenizer.json."""

import json
import pathlib
import random
import unicodedata

import pytest
import tokenizers

MODEL = pathlib.Path(__file__).resolve().parents[2] / "deploy/models/ling-tiny"
NUM_STRINGS = 12_000

CJK = "的一是不了人我在有他这中大来上国语言模型漢字かなカナ한국어"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ACCENTED = "äöüßéèêñçøåłžșğıİſΑβγΩабвгЖЩאבגدثपकท"
MARKS = "\u0301\u0308\u20d7\u0e34\u094d\u200d\ufe0f"  # combining: neither letters nor numbers, some of them
DIGITS = "0123456789٣५²½Ⅷ"
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", "\x0b",
          "\x0c", " \t\n \n  "]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—“”„¿¡§©™€£"
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧", "🇩🇪", "❤️", "🫠", "1️⃣"]
CONTRACTIONS = ["'s", "'S", "'t", "'RE", "'ve", "'m", "'ll", "'d", "'x", "’s", "don't", "I'LL", "'ſ"]
CODE = ["int main() {\n\treturn 0;\n}\n", "def f(x):\n    return x**2  # square\n", "for(i=0;i<10;++i)", "SELECT * FROM t WHERE a='b';",
        '{"name": "f", "arguments": {"a": [1, 2.5e-3]}}', "<div class=\"x\">&nbsp;</div>", "a->b::c()\r\n\r\n", "#!/bin/sh\n\n\n"]
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>", "<|reserved_token_3|>",
            "<|role_end", "<role", "<think>", "<tool_call>", "<role>HUMAN</role>"]
CONTROLS = "\x00\x01\x7f\u200b\ufeff\ufffd\ue000\U000e0001\U0010ffff"


def one_string(rng, words):
    """A few pieces of different kinds, glued together."""
    def piece():
        kind = rng.randrange(14)
        if kind <= 2:
            return rng.choice(words)
        if kind == 3:
            return "".join(rng.choices(LETTERS, k=rng.randint(1, 12)))
        if kind == 4:
            return "".join(rng.choices(CJK, k=rng.randint(1, 8)))
        if kind == 5:
            return "".join(rng.choices(ACCENTED + MARKS + LETTERS[:6], k=rng.randint(1, 8)))
        if kind == 6:
            return "".join(rng.choices(DIGITS, k=rng.randint(1, 6)))
        if kind == 7:
            return "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 5)))
        if kind == 8:
            return "".join(rng.choices(SPACES, k=rng.randint(1, 3)))
        if kind == 9:
            return rng.choice(EMOJI)
        if kind == 10:
            return rng.choice(CONTRACTIONS)
        if kind == 11:
            return rng.choice(CODE)
        if kind == 12:
            return rng.choice(SPECIALS)
        code = rng.choice([ord(rng.choice(CONTROLS)), rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x20000)])
        return chr(code)

    return "".join(piece() + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))


@pytest.fixture(scope="module")
def strings():
    rng = random.Random(7)
    words = [word for line in (MODEL / "heldout.jsonl").read_text().splitlines()[:300]
             for message in json.loads(line)["messages"] for word in message["content"].split()]
    made = ["", " ", "\n", "a", "\u0301", "<|role_end|>"] + [one_string(rng, words) for _ in range(NUM_STRINGS)]
    made += [f"a{space}b{space}" for space in SPACES]
    # Every character that Python knows a category for, in runs, so that letters, numbers and the rest are told apart.
    assigned = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
    rng.shuffle(assigned)
    return made + ["x".join(assigned[i:i + 40]) for i in range(0, 40_000, 40)]


@pytest.fixture(scope="module")
def reference():
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_equals_tokenizers(probe, reference, strings):
    assert len(strings) >= 10_000
    answer = probe.must(op="load_tokenizer", directory=str(MODEL))
    assert answer["size"] == reference.get_vocab_size() and answer["chat_format"] == "v2"
    for text in strings:
        ids = probe.must(op="tokenize", text=text)["ids"]
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        back = probe.must(op="detokenize", ids=ids)
        assert bytes.fromhex(back["hex"]) == text.encode(), repr(text)  # byte by byte,
        assert back["text"] == text, repr(text)                         # and as a stream that never splits a code point


def test_special_text_as_ordinary_text(probe, reference, strings):
    """What a user writes is never a control token when it must not be: no special id, and the same text again."""
    probe.must(op="load_tokenizer", directory=str(MODEL))
    specials = set(range(reference.get_vocab_size() - 32, reference.get_vocab_size()))
    seen = 0
    for text in strings[:3000]:
        ids = probe.must(op="tokenize", text=text, parse_special=False)["ids"]
        assert not specials & set(ids)
        assert probe.must(op="detokenize", ids=ids)["text"] == text
        seen += any(special in text for special in SPECIALS[:7])
    assert seen > 100, "the strings must contain special tokens for this to say anything"


def test_any_ids_decode_as_tokenizers_does(probe, reference):
    """Arbitrary id sequences: broken UTF-8 becomes U+FFFD, in the stream as in the whole."""
    probe.must(op="load_tokenizer", directory=str(MODEL))
    rng = random.Random(8)
    for _ in range(1000):
        ids = [rng.randrange(reference.get_vocab_size()) for _ in range(rng.randint(1, 12))]
        answer = probe.must(op="detokenize", ids=ids, skip_special=True)
        assert answer["text"] == reference.decode(ids, skip_special_tokens=True), ids
        assert "".join(answer["pieces"]) == answer["text"]


@pytest.mark.parametrize("raw", [b"\xff", b"a\x80", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"ok\xe2\x82"])
def test_invalid_utf8_is_refused(probe, raw):
    """JSON itself carries the bytes: the engine must refuse them by name, not repair them."""
    probe.must(op="load_tokenizer", directory=str(MODEL))
    probe.process.stdin.flush()
    probe.process.stdin.buffer.write(b'{"op": "tokenize", "text": "' + raw + b'"}\n')
    probe.process.stdin.buffer.flush()
    answer = json.loads(probe.process.stdout.readline())
    assert not answer["ok"] and "UTF-8" in answer["error"], answer
    assert probe.must(op="tokenize", text="still alive")["ids"]
