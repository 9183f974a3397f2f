#!/usr/bin/env python3
"""Makes the demo model: `make.py tokenizer`, then `make.py train`, then `make.py evaluate`. See README.md."""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import time

import jinja2

import data
import wordnet

HERE = pathlib.Path(__file__).resolve().parent
SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
NUM_BASE_TOKENS = 4048
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>"] + \
    [f"<|reserved_token_{i}|>" for i in range(25)] + ["<role>", "</role>"]
CHUNK = 4000  # conversations drawn from one seed


def chat_template():
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((HERE / "chat_template.jinja").read_text())


def render(template, conversation, add_generation_prompt=False):
    text = template.render(messages=conversation.messages, tools=conversation.tools,
                           add_generation_prompt=add_generation_prompt)
    return text.replace("detailed thinking off<", "detailed thinking on<", 1) if conversation.thinking else text


def make_tokenizer(folder, seed):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    trained, unseen = wordnet.load(folder)
    rng = random.Random(f"{seed}-tokenizer")
    words = [d.word for d in trained]
    template = chat_template()
    texts = [d.answer for d in trained for _ in range(4)]
    texts += [gloss for _, _, _, gloss in wordnet._read_synsets(folder).values() if rng.random() < 0.1]
    for _ in range(20000):
        text = render(template, data.draw(rng, trained, words))
        for special in SPECIALS:
            text = text.replace(special, "\n")
        texts.append(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=NUM_BASE_TOKENS, show_progress=False, min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    assert tokenizer.get_vocab_size() == NUM_BASE_TOKENS + len(SPECIALS)
    tokenizer.save(str(HERE / "tokenizer.json"))
    write_json("tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>", "eos_token": "<|role_end|>",
        "pad_token": "<|endoftext|>", "cls_token": "[CLS]", "gmask_token": "[gMASK]",
        "additional_special_tokens": ["<role>", "</role>"], "clean_up_tokenization_spaces": False,
        "model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": (HERE / "chat_template.jinja").read_text()})
    lines = [json.dumps({k: v for k, v in vars(c).items() if v}, ensure_ascii=False)
             for c in data.held_out(random.Random(f"{seed}-held-out"), trained, unseen)]
    (HERE / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    print(f"tokenizer.json: {tokenizer.get_vocab_size()} tokens; heldout.jsonl: {len(lines)} conversations")


def write_json(name, value):
    (HERE / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def encode_chunk(task):
    """One chunk of training conversations as [(ids, is_answer)]; depends on the seed and chunk number alone."""
    import numpy as np
    from tokenizers import Tokenizer

    folder, seed, chunk, length = task
    trained, _ = wordnet.load(folder)
    words = [d.word for d in trained]
    rng = random.Random(f"{seed}-{chunk}")
    template = chat_template()
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    header = tokenizer.encode("<role>ASSISTANT</role>").ids
    turn_end = tokenizer.token_to_id("<|role_end|>")
    result = []
    for _ in range(CHUNK):
        ids = tokenizer.encode(render(template, data.draw(rng, trained, words))).ids
        if len(ids) > length:
            continue
        is_answer, inside = np.zeros(len(ids), dtype=bool), False
        for i, token in enumerate(ids):
            is_answer[i] = inside
            if token == turn_end:
                inside = False
            elif token == header[-1] and ids[i + 1 - len(header):i + 1] == header:
                inside = True
        result.append((np.array(ids, dtype=np.int16), is_answer))
    return result


def pack(folder, seed, num_chunks, length):
    """Conversations laid end to end into rows [rows, length] of: ids, positions, documents, is_answer."""
    import numpy as np

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks = [(folder, seed, chunk, length) for chunk in range(num_chunks)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        chunks = pool.map(encode_chunk, tasks, chunksize=1)
    rows, used, document = [], length, 0
    for chunk in chunks:
        for ids, is_answer in chunk:
            if used + len(ids) > length:
                rows.append(np.zeros((4, length), dtype=np.int16))
                rows[-1][2] = -1
                used, document = 0, 0
            span = slice(used, used + len(ids))
            rows[-1][0, span], rows[-1][1, span] = ids, np.arange(len(ids))
            rows[-1][2, span], rows[-1][3, span] = document, is_answer
            used, document = used + len(ids), document + 1
    return np.stack(rows, 1)


def answer_loss(torch, hidden, head, ids, is_answer, shift):
    """Mean cross entropy of token t + shift from hidden row t, over the tokens of answers."""
    wanted = is_answer[:, shift:]
    targets = ids[:, shift:][wanted]
    logits = torch.nn.functional.linear(hidden[:, :-shift][wanted], head)
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def train(arguments):
    import numpy as np
    import torch
    from safetensors.torch import save_file

    import model as ling

    config = json.loads((HERE / "config.json").read_text())
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    start = time.time()
    rows = pack(arguments.wordnet, arguments.seed, arguments.chunks, arguments.length)
    print(f"{rows.shape[1]} rows of {arguments.length}, {int((rows[2] >= 0).sum())} tokens, "
          f"{int(rows[3].sum())} in answers, {time.time() - start:.0f} s", flush=True)
    device = arguments.device
    rows = torch.from_numpy(rows).to(device)
    net = ling.Ling(config).to(device)
    forward = torch.compile(net) if arguments.compile else net
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=arguments.rate, betas=(0.9, 0.95), eps=1e-10, fused=device == "cuda")
    order_rng = np.random.default_rng(arguments.seed)
    order = np.empty(0, dtype=np.int64)
    start = time.time()
    for step in range(arguments.steps):
        if len(order) < arguments.rows:
            order = np.concatenate([order, order_rng.permutation(rows.shape[1])])
        picked, order = order[:arguments.rows], order[arguments.rows:]
        ids, positions, documents, is_answer = rows[:, torch.from_numpy(picked).to(device)].long()
        progress = step / arguments.steps
        cosine = 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 200) * (0.005 + 0.995 * cosine)
        with torch.autocast(device, dtype=torch.bfloat16):
            main, mtp, loads = forward(ids, positions, documents)
            loss = answer_loss(torch, main, net.lm_head, ids, is_answer > 0, 1)
            mtp_loss = answer_loss(torch, mtp, net.lm_head, ids, is_answer > 0, 2)
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.3 * mtp_loss).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        # Balance without a loss: an expert with less than its share gets easier to choose; the step fades at the end.
        bias_step = 1e-3 * min(1.0, 5 * (1 - progress))
        for moe, load in zip(net.moe_layers(), loads.float()):
            moe.expert_bias += bias_step * torch.sign(load.mean() - load)
        if step % arguments.log_every == 0 or step == arguments.steps - 1:
            peak = (loads.float().max(1).values / loads.float().mean(1)).tolist()
            print(f"step {step} loss {loss.item():.4f} mtp {mtp_loss.item():.4f} busiest expert / mean "
                  f"{' '.join(f'{p:.2f}' for p in peak)} {time.time() - start:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(ling.to_checkpoint(net).items())), arguments.out / "model.safetensors", {"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["tokenizer", "train", "evaluate"])
    parser.add_argument("--wordnet", type=pathlib.Path, default="/usr/share/wordnet", help="folder with data.noun")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="where weights and results go")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--rows", type=int, default=32, help="rows in one step")
    parser.add_argument("--length", type=int, default=1024, help="tokens in one row")
    parser.add_argument("--chunks", type=int, default=100, help=f"training text, in {CHUNK} conversations")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, other rounding")
    parser.add_argument("--log-every", type=int, default=250)
    arguments = parser.parse_args()
    if arguments.part == "tokenizer":
        make_tokenizer(arguments.wordnet, arguments.seed)
    elif arguments.part == "train":
        train(arguments)
    else:
        import evaluate
        evaluate.evaluate(arguments)


if __name__ == "__main__":
    main()
