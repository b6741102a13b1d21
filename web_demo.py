"""Chat with a model in the browser, and look at training runs while they run.

    python web_demo.py                               # serve_api.py with its default model is started too
    python web_demo.py --model reason --lora cooking=out/lora/cooking_512
    python web_demo.py --server http://127.0.0.1:9000    # a server that runs already
    streamlit run web_demo.py -- --model full_sft    # the same, with streamlit's own flags before the --

The page is a client of ``serve_api.py``; docs/web.md describes it.
"""

import sys
from pathlib import Path

from minillm.cli.command_line import script
from minillm.web.app import draw_app, is_page, prepare, start_streamlit

SERVER = Path(__file__).with_name("serve_api.py")


@script
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if is_page():  # Streamlit runs this file for each visitor and after each click
        draw_app(argv, SERVER)
    else:
        args, _, _ = prepare(argv, SERVER)  # reports what is wrong
        start_streamlit(__file__, argv, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
