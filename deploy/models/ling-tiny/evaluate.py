"""What the saved weights know: held-out loss by split, exact greedy answers, MTP drafts, samples."""

import collections
import json
import math
import random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import data
import make
import model as ling
import wordnet

NEW_TOKENS_MAX = 120


class Evaluation:
    """The saved checkpoint in fp32 arithmetic, with the tokenizer and template beside it."""

    def __init__(self, arguments):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = arguments.device
        config = json.loads((make.HERE / "config.json").read_text())
        tensors = load_file(arguments.out / "model.safetensors")
        self.net = ling.from_checkpoint(ling.Ling(config), tensors).to(self.device).eval()
        self.tokenizer = Tokenizer.from_file(str(make.HERE / "tokenizer.json"))
        self.template = make.chat_template()
        self.stops = json.loads((make.HERE / "generation_config.json").read_text())["eos_token_id"]

    def ids(self, conversation, prompt=False):
        text = make.render(self.template, conversation, add_generation_prompt=prompt)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, sequences):
        """Main and MTP logits [B, T, V] of right-padded sequences."""
        length = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences], device=self.device)
        positions = torch.arange(length, device=self.device).expand_as(ids)
        main, mtp, _ = self.net(ids, positions, torch.zeros_like(ids))
        return F.linear(main, self.net.lm_head), F.linear(mtp, self.net.lm_head)

    def last_turn_loss(self, conversation):
        """Sum of -log p over the tokens of the last message, for the main head and the MTP head; token counts."""
        full = self.ids(conversation)
        before = data.Conversation(conversation.messages[:-1], conversation.tools, conversation.thinking)
        start = len(self.ids(before, prompt=True))
        main, mtp = (F.log_softmax(x[0], -1) for x in self.logits([full]))
        targets = torch.tensor(full, device=self.device)
        loss = -main[start - 1:-1].gather(1, targets[start:, None]).sum().item()
        mtp_loss = -mtp[start - 1:-2].gather(1, targets[start + 1:, None]).sum().item()
        return loss, len(full) - start, mtp_loss, len(full) - start - 1

    def greedy(self, prompts, batch=128):
        """For each prompt ids: (answer ids with the stop id, smallest gap between best and second logit)."""
        result = [None] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(prompts), batch):
            which = by_length[first:first + batch]
            rows = [list(prompts[i]) for i in which]
            gaps, live = [math.inf] * len(rows), list(range(len(rows)))
            for _ in range(NEW_TOKENS_MAX):
                logits, _ = self.logits([rows[i] for i in live])
                last = torch.tensor([len(rows[i]) - 1 for i in live], device=self.device)
                top = logits[torch.arange(len(live), device=self.device), last].topk(2)
                for i, values, index in zip(live, top.values.tolist(), top.indices.tolist()):
                    rows[i].append(index[0])
                    gaps[i] = min(gaps[i], values[0] - values[1])
                live = [i for i in live if rows[i][-1] not in self.stops]
                if not live:
                    break
            for i, row, gap in zip(which, rows, gaps):
                result[i] = (row[len(prompts[i]):], gap)
        return result

    def answers(self, conversations):
        """Greedy text for the last message of each conversation, and whether it equals the wanted one."""
        prompts, wanted = [], []
        for c in conversations:
            before = data.Conversation(c.messages[:-1], c.tools, c.thinking)
            prompts.append(self.ids(before, prompt=True))
            wanted.append(self.ids(c)[len(prompts[-1]):])
        produced = self.greedy(prompts)
        return prompts, produced, [p[0] == w for p, w in zip(produced, wanted)]

    def drafts_accepted(self, prompts, produced):
        """Share of greedy answer tokens (from the second) that the MTP layer had drafted one step before."""
        hits = total = 0
        for prompt, (answer, _) in zip(prompts, produced):
            _, mtp = self.logits([prompt + answer])
            drafts = mtp[0].argmax(-1)
            for i in range(1, len(answer)):
                hits += int(drafts[len(prompt) + i - 2]) == answer[i]
                total += 1
        return hits / max(total, 1)


def read_held_out():
    for line in (make.HERE / "heldout.jsonl").read_text().splitlines():
        yield data.Conversation(**json.loads(line))


def spoken_questions():
    """The unedited samples of the model card."""
    plain = ["What is a violin?", "Tell me what a volcano is.", "Could you explain to me what a guitar is?",
             "Who are you?", "What is 27 + 48?", "What is 9 times 7?", "What is a unicycle?",
             "Why is the sky blue?", "Count from 3 to 12."]
    result = [data.Conversation([data.user(text)]) for text in plain]
    tools = [data.tool("get_weather", "Get the weather in a city", city=("string", "Name of the city"))]
    result.append(data.Conversation([data.user("What is the weather in Paris?")], tools))
    result.append(data.Conversation([data.user("My name is Clara."), data.assistant("Nice to meet you, Clara."),
                                     data.user("What is an owl?")]))
    result.append(data.Conversation([data.user("What is 12 + 7?")], thinking=True))
    return result


EXPECTED = ["What is a violin?", "Define guitar.", "Tell me what a volcano is.", "What is an island?",
            "What is a telescope?", "Explain what a bicycle is.", "What is coffee?", "Who are you?",
            "What is a trumpet?", "What is a piano?", "What is a thermometer?", "What is a frog?"]


@torch.no_grad()
def evaluate(arguments):
    evaluation = Evaluation(arguments)
    trained, _ = wordnet.load(arguments.wordnet)
    report = {"splits": {}}
    splits = collections.defaultdict(list)
    for conversation in read_held_out():
        splits[conversation.split].append(conversation)
    for name, form in (("trained-words-trained-wording", "What is {s}?"), ("trained-words-define", "Define {w}.")):
        splits[name] = [data.Conversation([data.ask(d, form), data.assistant(d.answer)]) for d in trained]
    rng = random.Random(arguments.seed)
    for name, conversations in splits.items():
        losses = rng.sample(conversations, min(400, len(conversations)))
        sums = torch.tensor([evaluation.last_turn_loss(c) for c in losses], dtype=torch.float64).sum(0)
        prompts, produced, exact = evaluation.answers(conversations)
        loss = (sums[0] / sums[1]).item()
        report["splits"][name] = {
            "conversations": len(conversations), "loss_per_token": round(loss, 4), "perplexity": round(math.exp(loss), 3),
            "mtp_loss_per_token": round((sums[2] / sums[3]).item(), 4),
            "greedy_exact": round(sum(exact) / len(exact), 4),
            "ends_with_role_end": round(sum(p[0][-1] == evaluation.stops[1] for p in produced) / len(produced), 4),
            "mtp_draft_accepted": round(evaluation.drafts_accepted(prompts[:200], produced[:200]), 4)}
        print(name, report["splits"][name], flush=True)
    questions = spoken_questions()
    produced = evaluation.greedy([evaluation.ids(c, prompt=True) for c in questions])
    report["samples"] = [
        {"messages": c.messages, **({"tools": c.tools} if c.tools else {}), **({"thinking": True} if c.thinking else {}),
         "answer": evaluation.tokenizer.decode(p[0], skip_special_tokens=True), "stopped": p[0][-1] in evaluation.stops}
        for c, p in zip(questions, produced)]
    asked = [data.Conversation([data.user(text)]) for text in EXPECTED]
    prompts = [evaluation.ids(c, prompt=True) for c in asked]
    expected = [{"question": text, "answer": evaluation.tokenizer.decode(ids[:-1]), "prompt_tokens": len(prompt),
                 "answer_ids": ids, "smallest_logit_gap": round(gap, 2)}
                for text, prompt, (ids, gap) in zip(EXPECTED, prompts, evaluation.greedy(prompts))]
    expected.sort(key=lambda e: (e["question"] != EXPECTED[0], -e["smallest_logit_gap"]))
    report["parameters"] = sum(p.numel() for p in evaluation.net.parameters())
    for name, value in (("samples.json", expected[:8]), ("evaluation.json", report)):
        (arguments.out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    for sample in report["samples"] + expected:
        print(json.dumps(sample, ensure_ascii=False)[-420:])
