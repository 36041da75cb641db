#!/usr/bin/env python3
"""From the records of runs: RESULTS.md, results/records.jsonl and pictures.  python results/report.py

Reads results/records.jsonl and runs/*/*.json of the working directory. A table has a row for each label. All are
measured on the same images and compared image by image: let d_i be the mean over seeds, and attacks, of right_a -
right_b. The gain of a on b is the mean of d_i; its error is the root of (variance over images / images + variance over
seeds / seeds). 'Clearly' means: by over two errors. A claim needs three seeds of each row that it compares; until then
it is open. A data set's main table is, of those with an SGD row, the one of most records times images.
These rules and CLAIMS are older than the results in records.jsonl, not than former.jsonl's. Mended since: C1 is judged
for each rho and AT's curve is of linf alone (after two CIFAR-10 runs; no verdict changed); the error of C3b and C6 counts
that of the place on the curve (after six; C6's went from 0.2 to 11.2; the demo's C6 went from below to on); C3b
and C6 name what they compare with, the curve or a row; wording.
"""
import base64
import json
from itertools import groupby, pairwise
from pathlib import Path

import numpy

CLAIMS = {
    "C1": "SAM alone is more robust, for free: this rho is clearly ahead of SGD under every attack and costs at most 0.5 "
          "of clean accuracy, with two errors to spare",
    "C2": "AT is most robust, at a price: the AT of the highest mean is clearly ahead of every SAM under every attack "
          "and clearly costs clean accuracy",
    "C3a": "They differ in place: the best SAM is what C1 asks for, gains clearly less and costs clearly less than the "
           "AT of C2",
    "C3b": "And in price: at equal clean accuracy the best SAM is above, on or below AT of 5 steps (6 gradients a step)",
    "C5": "The variants ASAM and ESAM do what SAM does in C1",
    "C6": "SAM is a light substitute for AT: as C3b, against AT of one step (2 gradients a step, as SAM); below means no",
}

HEAD = """# Results

Written by `results/report.py`, which states the rules, from the records of runs.

- Under attack: the mean of the attacks. Gains are on a table's first row, SGD where it was run, in points, over the
  seeds that both have.
- ±: one standard error, over images and seeds; of one seed over images alone, which is too small. Bars in the pictures
  are the gains' errors, so SGD has none.
- Clearly: by over two errors. Where three seeds decide, that is 82% sure, not 95%. No: a part of the claim is not
  shown.
- Best SAM: the most robust of those that C1 finds free, if any, else of all.
- C3b and C6 compare it with a curve from SGD over the radii of AT that they name. On the curve: within two errors,
  which are large where it is steep: there compare the rows. A SAM that is more accurate than the whole curve is
  compared with the nearest row: 'above sgd' says nothing of AT. One radius says little.
- C4, the simplified model, is section 11 of `sam_at.py` and of its tests.
- Rise of the loss: how much higher it is, in nats, after SAM's step of length rho, or under an attack. rho does not see
  that BatchNorm lets weights be rescaled. Ranks are those at rho 0.1 and at linf 1/255.
- Cost, in gradients a step: SGD 1, SAM 2, AT 1 and its attack's steps; in seconds: `results/costs.txt`.
- PGD-10 is not the strongest attack. What PGD-50 takes from 200 images is in the records (`stronger`), as are machine,
  threads and torch of each run: runs of a table may be of different processors.
- The demo is synthetic, made to show the effect: an illustration.
- `results/former.jsonl` keeps earlier records: of a JPEG copy of CIFAR-10, of a tenth of its own images, and of former
  demos.
"""

def family(row):
    """Rows of a family differ in their radius alone."""
    if row.method in ("at", "sam+at", "awp"):
        return row.method, row.norm, row.attack_steps
    return (row.method,)

def order(row):
    """SGD, SAM and variants, AT and variants; each family by its radius."""
    return len(family(row)), row.method != "sgd", family(row), row.eps, row.rho

def columns_of(record):
    """{name: 100 or 0 for each image}, with the mean of all attacks; of rises of the loss, {name: one number}."""
    columns = {name: numpy.array([value]) for name, value in record["figures"].items()}
    for name, text in record["right"].items():
        packed = numpy.frombuffer(base64.b64decode(text), numpy.uint8)
        columns[name] = 100.0 * numpy.unpackbits(packed, count=record["images"])
    if "clean" in columns:
        columns["under attack"] = numpy.mean([columns[name] for name in columns if name != "clean"], 0)
    return columns

class Row(dict):
    """Of one label: its columns, {name: (seeds, images)}, NaN where a seed was not run; its settings are attributes."""
    seeds = frozenset()

def table_of(records):
    """The rows of a title."""
    seeds = sorted({record["settings"]["seed"] for record in records})
    rows = {}
    for record in records:
        row = rows.setdefault(record["label"], Row())
        vars(row).update(record["settings"])
        row.seeds |= {row.seed}
        for name, column in columns_of(record).items():
            missing = numpy.full((len(seeds), column.size), numpy.nan)
            row.setdefault(name, missing)[seeds.index(row.seed)] = column
    return sorted(rows.values(), key=order)

def figure(row, name="under attack"):
    return numpy.nanmean(row[name])

def gain(a, b):
    """Points by which column a is ahead of b, and the error of that, over the seeds that both have."""
    d = a - b
    d = d[~numpy.isnan(d[:, 0])]
    square = 0
    for means in d.mean(0), d.mean(1):
        if len(means) > 1:
            square += means.var(ddof=1) / len(means)
    return d.mean(), square ** 0.5

def ahead(a, b, *names):
    """Whether a row is clearly ahead of another in all those columns."""
    return all(points > 2 * error for points, error in (gain(a[name], b[name]) for name in names))

def free(row, sgd):
    """Whether it is what C1 asks for."""
    points, error = gain(row["clean"], sgd["clean"])
    return ahead(row, sgd, *row.attacks) and 2 * error - points <= 0.5

def height(row, curve):
    """How far it lies above what, at its own clean accuracy, and the error of that: a curve of rows, or, beyond its
    ends, the nearest row. Between p and q (of falling pairs the last) the curve is the line of networks that are q with
    probability t, else p. Along it the score, robust + slope * clean, stays as it is: a row's height is its score's."""
    def score(row):
        return row["under attack"] + slope * row["clean"]

    clean, slope = figure(row, "clean"), 0
    nearest = min(curve, key=lambda other: abs(figure(other, "clean") - clean))
    there, name = score(nearest), nearest.label
    for p, q in pairwise(curve):
        high, low = figure(p, "clean"), figure(q, "clean")
        if low <= clean <= high != low:
            t = (high - clean) / (high - low)
            slope = (figure(q) - figure(p)) / (high - low)
            there, name = (1 - t) * score(p) + t * score(q), "the curve"
    return name, *gain(score(row), there)

def verdicts(sgd, *rows):
    """{claim: verdict}, of those claims that the rows say something on."""
    def rows_of(*methods):
        return [row for row in rows if row.method in methods]

    sams = rows_of("sam")
    ats = rows_of("at")
    found = {}

    def judge(verdict, *rows):
        """The verdict, and the rows that it rests on, beside SGD's."""
        verdict = {True: "yes", False: "no"}.get(verdict, verdict)
        if len(sgd.seeds.intersection(*(row.seeds for row in rows))) < 3:
            verdict = f"open, so far {verdict}"
        return f"**{verdict}** ({', '.join(row.label for row in rows)})"

    for claim, tried in ("C1", sams), ("C5", rows_of("asam", "esam")):
        if tried:
            found[claim] = "; ".join(judge(free(row, sgd), row) for row in tried)
    if sams and ats:
        sam = max([row for row in sams if free(row, sgd)] or sams, key=figure)
        at = max(ats, key=figure)
        found["C2"] = judge(ahead(sgd, at, "clean") and all(ahead(at, row, *at.attacks) for row in sams), at, *sams)
        found["C3a"] = judge(free(sam, sgd) and ahead(at, sam, "under attack") and ahead(sam, at, "clean"), sam, at)
        for claim, steps in ("C3b", 5), ("C6", 1):
            curve = [row for row in ats if family(row) == ("at", "linf", steps)]
            if curve:
                name, points, error = height(sam, [sgd, *curve])
                word = "above" if points > 2 * error else "below" if points < -2 * error else "on"
                found[claim] = judge(f"{word} {name}: {points:+.1f} ± {error:.1f}", sam, *curve)
    return found

def markdown(head, lines):
    """A table, of lists of cells."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]

def lines_of(table):
    """Figures are means over seeds; gains are on the first row."""
    first = table[0]
    compared = ["clean", "under attack"] if "under attack" in first else []
    lines = []
    for row in table:
        cells = [row.label, f"{len(row.seeds)}"]
        cells += [f"{figure(row, name):.4g}" for name in first]
        for name in compared:
            points, error = gain(row[name], first[name])
            cells.append(f"{points:+.1f} ± {error:.1f}")
        lines.append(cells)
    return markdown(["", "seeds", *first, *(f"{name} gain" for name in compared)], lines)

def correlation(rows):
    """The rank correlation of the rises of the loss around the weights and around the inputs."""
    ranks = [numpy.argsort(numpy.argsort([figure(row, name) for row in rows])) for name in ("rho 0.1", "linf 1/255")]
    return numpy.corrcoef(ranks)[0, 1]

COLORS = {}  # of families, the same in every picture

def picture(name, table, x, y, words):
    """One column over another: a point for each row, with the errors of its gain. Those of a family are joined."""
    from matplotlib.figure import Figure
    axes = Figure((14, 8)).subplots()
    axes.set(title=name, xlabel=f"{x}{words}", ylabel=f"{y}{words}")
    axes.margins(0.25)  # for the labels
    for key, rows in groupby(table, family):
        crosses = []
        for row in rows:
            place = [figure(row, x), figure(row, y)]
            errors = [gain(row[column], table[0][column])[1] for column in (y, x)]
            axes.annotate(f"  {row.label}  \n", place, ha="left" if crosses else "right")  # the first beside the rest
            crosses.append(place + errors)  # in the order of errorbar's arguments
        axes.errorbar(*zip(*crosses), "o:", color=COLORS.setdefault(key, f"C{len(COLORS)}"))
    axes.figure.savefig(f"results/{name}.png", bbox_inches="tight")

def main():
    stored = Path("results/records.jsonl")
    lines = stored.read_text().splitlines()
    lines += map(Path.read_text, Path().glob("runs/*/*.json"))
    lines = dict.fromkeys(lines)  # each once
    titles = {}
    for record in map(json.loads, lines):
        titles.setdefault(record["table"], []).append(record)
    part = Path("results/records.part")  # not before all can be read
    part.write_text("".join(f"{line}\n" for line in lines))
    part.replace(stored)
    found, pictures, body = {}, {}, []
    for title, records in sorted(titles.items(), key=lambda item: -sum(record["images"] for record in item[1])):
        table, source = table_of(records), title.split(" (")[0]
        what = "Check"
        if "clean" not in table[0]:
            what = "Flatness"
            plain = [row for row in table if len(family(row)) == 1]
            if len(plain) > 2:
                drawn = table, "rho 0.1", "linf 1/255", ": mean rise of the loss, in nats (better ←)"
                pictures.setdefault(f"{source}-rise-of-the-loss", drawn)
                title += f"\n\nCorrelation of the ranks: {correlation(table):+.2f}; without AT {correlation(plain):+.2f}."
        elif table[0].method == "sgd" and source not in found:
            what, found[source] = "Main result", verdicts(*table)
            pictures[source] = table, "under attack", "clean", ": accuracy in percent (better →)"
        body += [f"\n## {what}: {source}\n\n{title}\n", *lines_of(table)]
    claims = [[f"{claim}. {meaning}"] + [verdict.get(claim, "open") for verdict in found.values()]
              for claim, meaning in CLAIMS.items()]
    top = [HEAD, *markdown(["", *found], claims), *(f"\n![{name}](<results/{name}.png>)" for name in pictures)]
    Path("RESULTS.md").write_text("\n".join(top + body), "utf-8")
    try:
        for name, drawn in pictures.items():
            picture(name, *drawn)
    except ImportError:
        print("report.py: for the pictures, pip install matplotlib")

if __name__ == "__main__":
    main()
