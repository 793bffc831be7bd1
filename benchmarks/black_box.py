"""kNN-LM and kNN-Adapter with a model behind an endpoint, against the same model with everything known.

    python -m benchmarks.black_box DATA_FOLDER [--corpora law,code]

DATA_FOLDER holds `<corpus>.{train,valid,test}.jsonl.xz`. The reference LM is served over HTTP on this machine. Two
datastores hold the same 150 k entries of `train`, one with keys of the reference LM, one with those of another encoder of
the same tokenizer: the reference LM without its last three layers, saved and loaded as a model of its own. Everything is
tuned on 4,000 tokens of `valid`, in short seeded pieces, and reported once on as many of `test`; k ≤ 1024, exact search.
Results are added to benchmarks/results/black_box.json and tabulated in black_box.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from memlm.evaluation._bootstrap import paired_bootstrap
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.mixtures import HeldOut

from .knn_lm import cut_documents, pieces

RESULTS = Path(__file__).parent / "results"
ENTRIES, TOKENS, PIECE, K = 150_000, 4_000, 400, 1024  # PIECE: characters; so there are enough pieces for intervals
LAYERS = 3  # of six, in the other encoder
TOP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--corpora", default="law,code")
    options = parser.parse_args()
    # small batches: an answer with all log-probabilities of 512 tokens has four million numbers
    lm = memlm.reference_lm(batch_tokens=512)
    with tempfile.TemporaryDirectory() as folder, serving(memlm.reference_lm()) as url:
        other = shallower(Path(folder) / "encoder")
        for corpus in options.corpora.split(","):
            result = measure(lm, other, url, options.data, corpus, Path(folder) / corpus)
            path = RESULTS / "black_box.json"
            results = json.loads(path.read_text()) if path.exists() else {}
            results[corpus] = result
            path.write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(results))
            print(table({corpus: result}), flush=True)


def shallower(folder: Path) -> Any:
    """Return another encoder of the same tokenizer: the reference LM's first layers."""
    lm = memlm.reference_lm()
    del lm.model.model.layers[LAYERS:]
    lm.model.config.num_hidden_layers = LAYERS
    if getattr(lm.model.config, "layer_types", None):
        lm.model.config.layer_types = lm.model.config.layer_types[:LAYERS]
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return memlm.load(folder, batch_tokens=512)


def measure(lm: Any, other: Any, url: str, data: Path, corpus: str, folder: Path) -> dict[str, Any]:
    """Tune on valid, report on test, for every way of knowing the model."""
    train = cut_documents(lm, list(memlm.Corpus(data / f"{corpus}.train.jsonl.xz")), ENTRIES)
    own, others = (
        memlm.Datastore.build(encoder, train, folder / name, index="exact")
        for name, encoder in (("own", lm), ("other", other))
    )
    valid, test = (Text(lm, pieces(data / f"{corpus}.{split}.jsonl.xz", PIECE), TOKENS) for split in ("valid", "test"))
    vocabulary = len(lm.tokenizer)
    ways = [
        ("white box", "its own", "all", lm, own),
        ("black box", "the same", f"all {vocabulary:,}", memlm.BlackBox(url, "reference", lm, top=vocabulary), own),
        ("black box", "the same", f"{TOP}", memlm.BlackBox(url, "reference", lm, top=TOP), own),
        ("black box", "another", f"{TOP}", memlm.BlackBox(url, "reference", other, top=TOP), others),
    ]
    alone = torch.cat([torch.empty(0), *(part.log_probs for part in other.score(test.ids))])
    result: dict[str, Any] = {
        "entries": len(own),
        "valid": {"tokens": valid.tokens, "pieces": len(valid.ids)},
        "test": {"tokens": test.tokens, "pieces": len(test.ids)},
        "other encoder alone": perplexity(alone),
        "ways": [],
    }
    reference: dict[str, Any] = {}
    for model, encoder, told, scorer, memory in ways:
        started = time.perf_counter()
        name = f"{corpus}: {model}, {encoder} encoder, {told} log-probabilities"
        cached = [
            gather(retrieve(scorer, text, memory, [K], beliefs=True, description=name), text.tokens)
            for text in (valid, test)
        ]
        seconds = time.perf_counter() - started
        held = HeldOut(cached[1].targets, cached[1].lm_log_probs, cached[1].evidence, test.document_of_target)
        model_alone = held.lm_log_probs.double()
        row: dict[str, Any] = {"model": model, "encoder": encoder, "log-probabilities": told, "seconds": seconds}
        row["lm"], fixed = perplexity(model_alone), model_alone
        for kind in ("knn", "adapter"):
            best: Any = tune_cached(cached[0], valid.document_of_target, kind, memory.statistics()).best
            mixed = held.log_probs(best)
            white = reference.setdefault(kind, mixed)
            plain = {name: value for name, value in best.to_dict().items() if isinstance(value, int | float)}
            row[kind] = {
                "perplexity": perplexity(mixed),
                "change": change(mixed - model_alone, test.document_of_target),
                "against white box": change(mixed - white, test.document_of_target),
                **plain,
            }
            if kind == "knn":
                fixed = mixed
            else:
                row[kind]["against fixed λ"] = change(mixed - fixed, test.document_of_target)
                row[kind]["parameters"] = best.network.parameters
                row[kind]["mean λ"] = float(best.weights(held.evidence).mean())
        result["ways"].append(row)
    return result


def perplexity(log_probs: torch.Tensor) -> float:
    return math.exp(-float(log_probs.double().mean()))


def change(gains: torch.Tensor, documents: np.ndarray) -> list[float]:
    """Return the change of perplexity in percent, and its paired bootstrap 95 % interval over pieces."""
    gain = paired_bootstrap(gains.numpy(), documents)
    return [100 * math.expm1(-nats) for nats in (gain.mean, gain.high, gain.low)]


@contextmanager
def serving(lm: Any) -> Iterator[str]:
    """Serve a model while the block runs; yield the base of the API."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choices = [
                f'{{"index": {index}, "text": "", "logprobs": {echo(lm.model, ids, body["logprobs"])}}}'
                for index, ids in enumerate(body["prompt"])
            ]
            data = f'{{"object": "text_completion", "choices": [{", ".join(choices)}]}}'.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def echo(model: Any, ids: list[int], top: int) -> str:
    """Tell of a prompt what a completions endpoint does: of each token its own and the likeliest log-probabilities.

    Numbers have six decimals, tokens are called by id, the target is added to the likeliest, as vLLM does. This is JSON,
    written by hand: `json.dumps` takes several times as long for millions of numbers.
    """
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=-1)
    own = log_probs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
    best = log_probs.topk(min(top, log_probs.shape[1]))
    names = [f'"token_id:{token}"' for token in range(log_probs.shape[1])]
    tops = []
    for token, log_prob, tokens, values in zip(ids[1:], own, best.indices.tolist(), best.values.tolist(), strict=True):
        told = {token: log_prob} | dict(zip(tokens, values, strict=True))
        tops.append("{" + ",".join([f"{names[other]}:{value:.6f}" for other, value in told.items()]) + "}")
    lists = {
        "tokens": [names[token] for token in ids],
        "token_logprobs": ["null", *(f"{log_prob:.6f}" for log_prob in own)],
        "top_logprobs": ["null", *tops],
    }
    return "{" + ", ".join(f'"{name}": [{",".join(values)}]' for name, values in lists.items()) + "}"


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    parts = [
        "# A model behind an endpoint, with a memory",
        "",
        "Perplexity per token on `test`. The reference language model is served over HTTP; *white box* is the same model in",
        f"this process. {ENTRIES // 1000} k entries of `train`; k ≤ {K:,}, T, λ and the adapter are fitted to {TOKENS:,} tokens of",
        "`valid`, each row's `test` was scored once, exact search. *Another* encoder is the reference model without the last",
        f"{6 - LAYERS} of its six layers, saved and loaded as a model of its own. The target's log-probability comes from echo; what",
        f"is not among the {TOP} told counts as one outcome in the entropy. *Change*: of the model's perplexity alone; all",
        f"intervals: paired bootstrap, 95 %, over pieces of text of at most {PIECE} characters, which are short so that there are",
        "enough of them. The reference model was trained on neither corpus, so most of the gain is the memory's own.",
        "",
        "    python -m benchmarks.black_box DATA",
        "",
    ]
    for corpus, result in results.items():
        held = result["test"]
        parts += [
            f"## {corpus}",
            "",
            f"{result['entries']:,} entries, {held['tokens']:,} test tokens in {held['pieces']} pieces (valid: "
            f"{result['valid']['tokens']:,} in {result['valid']['pieces']}); the other encoder alone, as a language model, "
            f"{result['other encoder alone']:,.0f}.",
            "",
            "| model | encoder | log-probabilities | model alone | kNN-LM, fixed λ | change | kNN-Adapter | change | "
            "against fixed λ | against white-box adapter |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in result["ways"]:
            knn, adapter = row["knn"], row["adapter"]
            against = _percent(adapter["against white box"], 2) if row["model"] != "white box" else ""
            parts.append(
                f"| {row['model']} | {row['encoder']} | {row['log-probabilities']} | {row['lm']:.2f} | "
                f"{knn['perplexity']:.2f} | {_percent(knn['change'])} | **{adapter['perplexity']:.2f}** | "
                f"{_percent(adapter['change'])} | {_percent(adapter['against fixed λ'])} | {against} |"
            )
        parts += [
            "",
            "| | λ fixed | T | k | mean λ of the adapter | parameters of the adapter |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["ways"]:
            knn, adapter = row["knn"], row["adapter"]
            parts.append(
                f"| {row['model']}, {row['encoder']}, {row['log-probabilities']} | {knn['interpolation_weight']:.2f} | "
                f"{knn['temperature']:.3g} | {knn['k']} | {adapter['mean λ']:.2f} | {adapter['parameters']:,} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _percent(values: list[float], decimals: int = 1) -> str:
    mean, low, high = (f"{value:+.{decimals}f}" for value in values)
    return f"{mean} % ({low} to {high})"


if __name__ == "__main__":
    main()
