#!/usr/bin/env python3
"""From the records of runs: DIR/RESULTS.md, DIR/results/records.jsonl and pictures.  python results/report.py DIR

Reads DIR/results/records.jsonl and DIR/runs/*/*.json. A table is {label: {seed: record}}, all measured on the same
images. Its networks are compared image by image: let d_i be the mean over seeds, and attacks, of right_a - right_b.
The gain of a on b is the mean of d_i; its error is the root of (variance over images / images + variance over seeds /
seeds). 'Clearly' means: by over two errors. These rules, and CLAIMS, were written before the runs. A claim needs three
seeds of each row that it compares; until then it is open.
"""
import base64
import json
import math
import sys
from pathlib import Path
from statistics import correlation, fmean, variance

CLAIMS = {
    "C1": "SAM alone is more robust, for free: a rho is clearly ahead of SGD under every attack and costs at most 0.5 "
          "of clean accuracy, with two errors to spare",
    "C2": "AT is most robust, at a price: the AT of the highest mean is clearly ahead of every SAM under every attack "
          "and clearly costs clean accuracy",
    "C3a": "They differ in place: the best SAM of C1 gains clearly less and costs clearly less than the AT of C2",
    "C3b": "And in price: at equal clean accuracy that SAM is above, on or below AT of 5 steps (6 gradients a step)",
    "C5": "The variants ASAM and ESAM do what SAM does in C1",
    "C6": "SAM is a light substitute for AT: the same against AT of one step (2 gradients a step, as SAM)",
}

def unpacked(text, n):
    """The n bits that a record holds in base64."""
    content = base64.b64decode(text)
    bits = f"{int.from_bytes(content, 'big'):0{8 * len(content)}b}"
    return [int(bit) for bit in bits[:n]]

def per_image(row):
    """{"clean", an attack, or "mean" of all attacks: {seed: [right, of each image]}} of a row, {seed: record}."""
    columns = {}
    for seed, record in row.items():
        attacked = []
        for name, text in record["right"].items():
            bits = unpacked(text, record["images"])
            columns.setdefault(name, {})[seed] = bits
            if name != "clean":
                attacked.append(bits)
        columns.setdefault("mean", {})[seed] = [fmean(image) for image in zip(*attacked)]
    return columns

def mix(a, b, t):
    """A column of networks that are b's with probability t, else a's."""
    return {seed: [(1 - t) * p + t * q for p, q in zip(a[seed], b[seed])] for seed in a.keys() & b.keys()}

def gain(a, b):
    """Points by which column a is ahead of b, and the error of that, over the seeds that both have."""
    differences = [[p - q for p, q in zip(a[seed], b[seed])] for seed in a.keys() & b.keys()]
    if not differences:
        return 0.0, math.inf
    images = [fmean(image) for image in zip(*differences)]
    seeds = [fmean(seed) for seed in differences]
    of_seeds = variance(seeds) / len(seeds) if len(seeds) > 1 else 0
    return 100 * fmean(images), 100 * math.sqrt(variance(images) / len(images) + of_seeds)

def accuracy(column):
    return 100 * fmean(fmean(seed) for seed in column.values())

def ahead(a, b):
    """Whether a is clearly ahead of b under every attack."""
    gains = [gain(a[name], b[name]) for name in a.keys() - {"clean", "mean"}]
    return all(points > 2 * error for points, error in gains)

def free(a, sgd):
    """Whether a is what C1 asks for."""
    points, error = gain(a["clean"], sgd["clean"])
    return ahead(a, sgd) and 2 * error - points <= 0.5

def height(a, curve):
    """How far a lies above a curve of rows at its own clean accuracy; beyond the curve's ends, above the nearest row."""
    clean = accuracy(a["clean"])
    left = right = min(curve, key=lambda row: abs(accuracy(row["clean"]) - clean))
    t = 0.0
    for p, q in zip(curve, curve[1:]):
        high, low = accuracy(p["clean"]), accuracy(q["clean"])
        if high >= clean >= low and high > low:
            left, right, t = p, q, (high - clean) / (high - low)
    return gain(a["mean"], mix(left["mean"], right["mean"], t))

def weight(rows):
    """How many test images a table is made of."""
    return sum(record["images"] for row in rows.values() for record in row.values())

def setting(row, name):
    return next(iter(row.values()))["settings"][name]

def verdicts(rows):
    """{claim: verdict} for a table with a row "sgd"; of the claims that its rows say something on."""
    table = {label: per_image(row) for label, row in rows.items()}
    sgd = table["sgd"]

    def of(*methods):
        return [label for label in rows if setting(rows[label], "method") in methods]

    def best(labels):
        return max(labels, key=lambda label: accuracy(table[label]["mean"]))

    def judge(holds, labels):
        word = holds if isinstance(holds, str) else "yes" if holds else "no"
        if min(len(rows[label]) for label in ["sgd", *labels]) < 3:
            word = f"open, so far {word}"
        return f"**{word}** ({', '.join(labels)})"

    found = {}
    sams, ats, variants = of("sam"), of("at"), of("asam", "esam")
    held = [label for label in sams if free(table[label], sgd)]
    if sams:
        found["C1"] = judge(len(held) > 0, held or sams)
    if variants:
        found["C5"] = "; ".join(judge(free(table[label], sgd), [label]) for label in variants)
    if sams and ats:
        sam, at = best(held or sams), best(ats)
        cost, error = gain(sgd["clean"], table[at]["clean"])
        most = all(ahead(table[at], table[label]) for label in sams)
        found["C2"] = judge(most and cost > 2 * error, [at, *sams])
        more, error = gain(table[at]["mean"], table[sam]["mean"])
        cheaper, clean_error = gain(table[sam]["clean"], table[at]["clean"])
        found["C3a"] = judge(sam in held and more > 2 * error and cheaper > 2 * clean_error, [sam, at])
        ats.sort(key=lambda label: setting(rows[label], "eps"))
        for claim, steps in ("C3b", 5), ("C6", 1):
            curve = ["sgd"] + [label for label in ats if setting(rows[label], "attack_steps") == steps]
            if len(curve) > 1:
                points, error = height(table[sam], [table[label] for label in curve])
                word = "on" if abs(points) <= 2 * error else "above" if points > 0 else "below"
                found[claim] = judge(f"{word}, by {points:+.1f} ± {error:.1f}", [sam, *curve[1:]])
    return found

def table_of(rows):
    """Its lines. Figures are means over seeds; gains are on SGD."""
    lines = []
    for label, row in rows.items():
        names = list(next(iter(row.values()))["figures"])
        cells = [label, str(len(row))]
        for name in names:
            cells.append(f"{fmean(record['figures'][name] for record in row.values()):.4g}")
        if "clean" in names:
            a, sgd = per_image(row), per_image(rows.get("sgd", row))
            for name in "clean", "mean":
                points, error = gain(a[name], sgd[name])
                cells.append(f"{points:+.1f} ± {error:.1f}")
                names.append(f"{name} gain")
        lines.append(f"| {' | '.join(cells)} |")
    return [f"| | seeds | {' | '.join(names)} |", "|---|" + "---:|" * (len(names) + 1), *lines]

def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

def rise(row, kind):
    """The mean rise of the loss of one kind: around the weights ("rho") or around the inputs ("l")."""
    return fmean(value for record in row.values() for name, value in record["figures"].items() if name.startswith(kind))

def link(rows):
    """The rank correlation of the rises around the weights and around the inputs."""
    sides = [ranks([rise(row, kind) for row in rows]) for kind in ("rho", "l")]
    return f"{correlation(*sides):+.2f}" if len(rows) > 2 else "open"

def picture(rows, path):
    """Clean over robust accuracy of a table's rows; those of a method are joined."""
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    for method in "sgd", "sam", "at":
        points = [per_image(row) for row in rows.values() if setting(row, "method") == method]
        x, y = ([accuracy(point[name]) for point in points] for name in ("mean", "clean"))
        axes.plot(x, y, "o-", label=method)
    axes.set(xlabel="mean accuracy under attack", ylabel="clean accuracy")
    axes.legend()
    axes.figure.savefig(path)

def main(place):
    stored = place / "results" / "records.jsonl"
    lines = stored.read_text("utf-8").splitlines() if stored.exists() else []
    lines += [path.read_text("utf-8") for path in sorted(place.glob("runs/*/*.json"))]
    records = [json.loads(line) for line in dict.fromkeys(lines)]  # each once
    records.sort(key=lambda record: (record["label"] != "sgd", record["label"]))
    tables = {}
    for record in records:
        rows = tables.setdefault(record["table"], {})
        rows.setdefault(record["label"], {})[record["settings"]["seed"]] = record
    text = ["# Results", "", "Written by `results/report.py`, which states the rules; ± is one standard error.", ""]
    text += [f"- {claim}. {meaning}." for claim, meaning in CLAIMS.items()]
    titles = sorted(tables, key=lambda title: -weight(tables[title]))  # the main one first
    compared = [title for title in titles if "sgd" in tables[title] and not setting(tables[title]["sgd"], "sharpness")]
    for title in titles:
        rows = tables[title]
        text += ["", f"## {title}", "", *table_of(rows), ""]
        if title in compared:
            text += [f"- {claim}: {verdict}" for claim, verdict in verdicts(rows).items()]
        elif "sgd" in rows:
            plain = [row for row in rows.values() if setting(row, "method") in ("sgd", "sam", "asam", "esam")]
            text.append(f"Rank correlation of the rises: {link(list(rows.values()))}, without AT {link(plain)}.")
    part = stored.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    part.replace(stored)
    Path(place, "RESULTS.md").write_text("\n".join([*text, ""]), "utf-8")
    try:
        for title in compared[:1]:
            picture(tables[title], place / "results" / "tradeoff.png")
    except ImportError:
        print("report.py: for the picture, pip install matplotlib")

if __name__ == "__main__":
    main(Path(sys.argv[1]))
