"""How the answers are made: the widgets next to the chat, each with a line that explains it."""

from dataclasses import dataclass

from minillm.web import st

N_ALTERNATIVES = 5  # per token
SLIDERS = {  # of the request: least, most, at first, step
    "temperature": (0.0, 2.0, 0.85, 0.05),
    "top_p": (0.05, 1.0, 0.85, 0.05),
    "top_k": (0, 200, 0, 1),
    "min_p": (0.0, 1.0, 0.0, 0.01),
    "repetition_penalty": (1.0, 2.0, 1.0, 0.05),
}


@dataclass(frozen=True)
class Settings:
    """What the widgets say.

    Attributes:
        fields: of the request, such as the temperature. n_earlier: turns of the conversation that are sent along.
        tools: names of the tools that the model may call.
    """

    fields: dict
    n_earlier: int
    tools: tuple[str, ...] = ()


def draw_settings(t, models: list[dict], tool_names: list[str]) -> Settings:
    """Draw the widgets and return what they say; ``t`` gives the words."""
    names = [model["id"] for model in models]
    parents = {model["id"]: model["parent"] for model in models if model.get("parent")}
    model = _kept(
        st.selectbox,
        t,
        "model",
        names,
        format_func=lambda name: f"{name}  ({parents[name]} + LoRA)" if name in parents else name,
    )
    tools: list[str] = []
    if tool_names:
        tools = _kept(st.multiselect, t, "tools", tool_names, placeholder=t("choose"))
    show_tokens = _kept(st.toggle, t, "show_tokens")
    with st.expander(t("sampling")):
        fields = {name: _kept(st.slider, t, name, *limits) for name, limits in SLIDERS.items()}
        fields["max_tokens"] = int(_kept(st.number_input, t, "max_tokens", 1, 1_000_000, 512, 64))
        seed = _kept(st.number_input, t, "seed", 0, 2**31 - 1, None, 1)
        fields |= {"seed": int(seed)} if seed is not None else {}
        n_earlier = _kept(st.slider, t, "n_earlier", 0, 20, 3, 1)
    fields |= {"model": model, "stream_options": {"include_usage": True}}
    fields |= {"logprobs": True, "top_logprobs": N_ALTERNATIVES} if show_tokens else {}
    return Settings(fields, n_earlier, tuple(tools))


def _kept(widget, t, name: str, *values, **options):
    """Draw a widget that keeps its value while another page is shown, and the line that explains it."""
    value = widget(t(name), *values, key=name, persist_state="session", **options)
    st.caption(t(f"{name}_note"))
    return value
