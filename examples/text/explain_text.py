"""Explain what a text classifier says about each word.

    explainserve serve --models examples/text/models
    python examples/text/explain_text.py "the food was not very good"

Integrated Gradients over the embedding, from a text of pad tokens; the numbers of a word's embedding are summed.
"""

import argparse

from explainserve_client import Attribution, Client, Constant, IntegratedGradients
from reviews import PAD, encode, vocabulary

TARGET = "positive"

EXAMPLES = (
    "the food was very good",
    "the food was not very good",
    "the film was not boring",
    "the room was dirty and the staff was rude",
)
CELLS = 20


def explain(client: Client, text: str) -> Attribution:
    """The logit of "positive" minus that at pad tokens, shared among the embeddings of the words."""
    result = client.explain(
        "reviews",
        encode([text], vocabulary()),
        targets=TARGET,
        layers=["embedding"],
        baselines=Constant(PAD),
        method=IntegratedGradients(step_count=128),
    )
    return result.attributions[0]


def table(text: str, found: Attribution) -> str:
    """A line for each word: its sum, and a bar whose length is relative to the largest of the text."""
    sums = found.tensor.sum(axis=1, dtype=float)
    largest = max(abs(sums).max(), 1e-12)
    lines = [
        f"  {word:12s} {value:+8.3f}  {('+' if value > 0 else '-') * round(CELLS * abs(value) / largest)}"
        for word, value in zip(text.split(), sums, strict=True)
    ]
    score, reference = found.instance_output_value, found.baseline_output_value
    ends = f"logit of {TARGET!r}: {score:+.3f}, of pad tokens {reference:+.3f}"
    return "\n".join([text, *lines, f"  {'sum':12s} {sums.sum():+8.3f}  {ends}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", default=EXAMPLES, help="texts to explain; default: four examples")
    parser.add_argument("--server", default="localhost:8001", help="HOST:PORT")
    arguments = parser.parse_args()
    with Client(arguments.server) as client:
        for text in arguments.texts:
            print(table(text, explain(client, text)), end="\n\n")


if __name__ == "__main__":
    main()
