"""`python -m msclip.convert IN OUT --to LAYOUT`: a model from any layout that can be read to any that has room for it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from msclip.checkpoint import read, with_tokenizer
from msclip.convert.weights import Layout
from msclip.convert.write import write
from msclip.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m msclip.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", help="a file, folder or URL; its layout is told by its contents")
    parser.add_argument("target", metavar="OUT", type=Path, help="a new folder for open_clip and huggingface, else a new file")
    parser.add_argument("--to", required=True, choices=get_args(Layout), help="the layout to write")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json or merges, instead of the input's own or for want of it"
    )
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a lone file that does not tell it")
    arguments = parser.parse_args(argv)
    try:
        overrides = {"activation": arguments.activation} if arguments.activation else {}
        weights = with_tokenizer(read(arguments.source, overrides), arguments.tokenizer, arguments.source)
        write(weights, arguments.target, arguments.to)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{arguments.source} ({weights.layout}) is now {arguments.target} ({arguments.to})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
