"""The two pages behind ``web_demo.py``, and how Streamlit is started to show them."""

import functools
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm.cli.command_line import parse
from minillm.cli.web_arguments import WebArguments
from minillm.errors import UserError, missing_package
from minillm.serving.tools import Toolbox
from minillm.serving.tools.examples import TOOLS
from minillm.serving.tools.functions import load_functions
from minillm.web import st
from minillm.web.chat_page import draw_chat_page
from minillm.web.client import Client
from minillm.web.runs_page import draw_runs_page
from minillm.web.server import ServerKeeper
from minillm.web.session import Session
from minillm.web.words import LANGUAGES, Words

_PREPARING = threading.Lock()  # tyro, for one, parses in one thread at a time
# Streamlit's own stop button ends the page's program, not the answer; and it flickers where a page refreshes.
STYLE = "<style>[data-testid=stStatusWidget]{display:none}</style>"


def is_page() -> bool:
    """Return whether Streamlit runs this program for a visitor, and not a user in a terminal."""
    if "streamlit" not in sys.modules:
        return False
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    return get_script_run_ctx(suppress_warning=True) is not None


def start_streamlit(program: str, argv: Sequence[str], *, host: str, port: int) -> None:
    """Serve the page that ``program`` with ``argv`` draws, until Ctrl-C.

    Raises:
        UserError: streamlit is not installed.
    """
    try:
        from streamlit.web import cli
    except ImportError:
        raise missing_package("streamlit", purpose="the web page", extra="web") from None
    flags = ["--server.address", host, "--server.port", str(port)]
    cli.main(["run", program, *flags, "--", *argv], prog_name="streamlit")


def prepare(argv: Sequence[str], server_program: Path) -> tuple[WebArguments, ServerKeeper, dict[str, Callable]]:
    """Return the arguments, the keeper of the server, and the tools by name: the same objects for all visitors.

    Args:
        server_program: what is started if no server answers.

    Raises:
        UserError, SystemExit: a wrong flag, address or file of tools.
    """
    with _PREPARING:
        return _prepare(tuple(argv), server_program)


@functools.cache
def _prepare(argv: tuple[str, ...], server_program: Path) -> tuple[WebArguments, ServerKeeper, dict[str, Callable]]:
    args = parse(WebArguments, list(argv))
    client = Client(args.server, api_key=args.key)
    command = _server_command(args, client, server_program) if args.start_server else []
    return args, ServerKeeper(client, command, api_key=args.key), _find_tools(args.tools)


def _server_command(args: WebArguments, client: Client, program: Path) -> list[str]:
    command = [sys.executable, str(program), "--host", client.host, "--port", str(client.port)]
    command += ["--save_dir", args.save_dir, "--grace_s", "5"]  # with the page, those who wait for answers go
    command += ["--model", args.model] if args.model else []
    for adapter in args.lora:
        command += ["--lora", adapter]
    return command + shlex.split(args.server_flags)


def _find_tools(path: str) -> dict[str, Callable]:
    """Return the tools of a Python file by their names; of no file: the example tools."""
    functions = load_functions(path) if path else TOOLS
    schemas = [schema.get("function") or schema for schema in Toolbox(functions).schemas]
    return {schema["name"]: function for schema, function in zip(schemas, functions, strict=True)}


def draw_app(argv: Sequence[str], server_program: Path) -> None:
    """Draw the page that the visitor has chosen, in the language that the visitor has chosen.

    The arguments are those of ``prepare``; what is wrong with them is what the page shows.
    """
    try:
        args, keeper, tools = prepare(argv, server_program)
    except UserError as error:
        st.error(str(error))
        return
    except SystemExit:  # tyro has printed what is wrong, or the help
        st.error(f"wrong flags: {shlex.join(argv)}; the terminal says more")
        return
    session = st.session_state.setdefault("session", Session())
    default = "zh" if (st.context.locale or "").startswith("zh") else "en"
    with st.sidebar:
        language = st.segmented_control(
            "Language / 语言", list(LANGUAGES), default=default, required=True, key="lang", bind="query-params",
            format_func=LANGUAGES.get, label_visibility="collapsed",
        )  # fmt: skip
    st.html(STYLE)
    t = Words(language)

    def chat() -> None:
        st.set_page_config(page_title="minillm", layout="centered")
        try:
            with st.spinner(t("starting")):
                keeper.ensure()
            draw_chat_page(t, keeper.client, session, tools)
        except UserError as error:
            st.error(t("wrong_key") if getattr(error, "status", None) == 401 else t("no_server"))
            st.code(str(error), language=None, wrap_lines=True)
            st.button(t("try_again"), on_click=keeper.forget_failure)

    def runs() -> None:
        st.set_page_config(page_title="minillm", layout="wide")
        draw_runs_page(t, Path(args.save_dir), session)

    pages = [
        st.Page(chat, title=t("chat"), icon=":material/chat:", url_path="chat", default=True),
        st.Page(runs, title=t("runs"), icon=":material/monitoring:", url_path="runs"),
    ]
    st.navigation(pages).run()
