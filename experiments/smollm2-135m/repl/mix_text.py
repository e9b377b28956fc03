"""Text of two kinds to calibrate on and to heal with: rows of Alpaca, and as many letters of WikiText-2 between them.

```bash
python experiments/smollm2-135m/repl/mix_text.py --instructions alpaca.jsonl --text wikitext.txt --output mixed.txt
```
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset

from lopt_hf.data.texts import read_text


def mix(instructions: Dataset, text: str) -> str:
    """Returns every row, and behind each as many paragraphs as keep the two kinds even."""
    paragraphs = [line for line in text.split("\n") if line.strip()]
    parts: list[str] = []
    of_rows = of_text = taken = 0
    for row in instructions:
        parts.append("\n".join(row[column] for column in ("instruction", "input", "output") if row[column]))
        of_rows += len(parts[-1])
        while taken < len(paragraphs) and of_text < of_rows:
            parts.append(paragraphs[taken].strip())
            of_text += len(paragraphs[taken])
            taken += 1
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the mixed text; a file that is there is not overwritten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", required=True, help="JSON lines with instruction, input and output.")
    parser.add_argument("--text", required=True, help="A .txt file, or id:configuration:split of the hub.")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    rows = load_dataset("json", data_files=arguments.instructions, split="train")
    with arguments.output.open("x", encoding="utf-8") as file:
        file.write(mix(rows, read_text(arguments.text, "text", fallback=None)))


if __name__ == "__main__":
    main()
