"""Chat with a model in the browser, and look at training runs while they run.

    python web_demo.py                               # serve_api.py with its default model is started too
    python web_demo.py --model reason --lora cooking=out/lora/cooking_512
    python web_demo.py --server http://127.0.0.1:9000    # a server that runs already
    streamlit run web_demo.py -- --model full_sft    # the same, with streamlit's own flags before the --

The page is a client of ``serve_api.py``; docs/web.md describes it.
"""

import shlex
import sys
from pathlib import Path

from minillm.cli.command_line import parse, script
from minillm.cli.web_arguments import WebArguments
from minillm.web.app import draw_app, is_page, start_streamlit
from minillm.web.client import Client
from minillm.web.server import server_keeper

SERVER = Path(__file__).with_name("serve_api.py")


@script
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(WebArguments, argv)
    client = Client(args.server)  # reports an address that is none
    if is_page():  # Streamlit runs this file for each visitor and after each click
        keeper = server_keeper(args.server, args.key, server_command(args, client))
        draw_app(keeper, Path(args.save_dir))
    else:
        start_streamlit(__file__, argv, host=args.host, port=args.port)


def server_command(args: WebArguments, client: Client) -> tuple[str, ...]:
    """Return the command that starts the server where ``client`` expects it; empty if none is to be started."""
    if not args.start_server:
        return ()
    command = [sys.executable, str(SERVER), "--host", client.host, "--port", str(client.port)]
    command += ["--save_dir", args.save_dir, "--grace_s", "5"]  # with the page, those who wait for answers go
    command += ["--model", args.model] if args.model else []
    for adapter in args.lora:
        command += ["--lora", adapter]
    return (*command, *shlex.split(args.server_flags))


if __name__ == "__main__":
    main()
