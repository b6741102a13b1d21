"""The words of the pages, in English and Chinese."""

LANGUAGES = {"en": "English", "zh": "中文"}

# Name: (English, Chinese).
WORDS = {
    "chat": ("Chat", "对话"),
    "runs": ("Training runs", "训练记录"),
    "choose": ("none chosen", "未选择"),
    # the server
    "starting": ("Starting the server; a large model takes minutes to load …", "正在启动服务，模型较大时需要几分钟……"),
    "no_server": ("There is no server to talk to.", "没有可用的服务。"),
    "wrong_key": (
        "The server asks for a key: start this page with the variable MINILLM_API_KEY, or with --api_key.",
        "服务需要密钥：启动本页面时设置环境变量 MINILLM_API_KEY，或加上 --api_key。",
    ),
    "try_again": ("Try again", "重试"),
    # chats
    "manage_chats": ("Export, import, delete", "导出、导入、删除"),
    "new_chat": ("New chat", "新对话"),
    "empty_chat": ("(empty)", "（空）"),
    "delete_chat": ("Delete this chat", "删除这个对话"),
    "export": ("Export all chats", "导出全部对话"),
    "import": ("Import chats (JSON)", "导入对话（JSON）"),
    "where_kept": (
        "Chats are kept in this browser tab and survive a reload; other tabs have their own.",
        "对话保存在当前浏览器标签页中，刷新后仍在；各标签页互不影响。",
    ),
    "greeting": ("What would you like to ask?", "想问点什么？"),
    "write_here": ("Ask something", "输入问题"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Answer again", "重新生成"),
    "edit": ("Edit", "编辑"),
    "ask_again": ("Ask again", "重新提问"),
    "cancel": ("Cancel", "取消"),
    "edit_note": ("The answer and all later turns are replaced.", "原回答以及之后的各轮对话会被替换。"),
    "waiting": ("waiting for the first token …", "等待第一个 token……"),
    "thinking": ("Thinking …", "思考中……"),
    "thoughts": ("Thoughts", "思考过程"),
    "no_answer": ("(no text)", "（没有文字）"),
    "speed": (
        "{n} tokens · {rate:.0f} tokens/s · first one after {first:.2f} s · {model}",
        "{n} 个 token · {rate:.0f} token/秒 · 首个 token {first:.2f} 秒 · {model}",
    ),
    "stopped": ("stopped", "已停止"),
    "length": ("cut at the longest answer", "达到长度上限，已截断"),
    # tokens
    "tokens": ("Tokens", "token 概率"),
    "tokens_note": (
        "Green: the model was sure; red: the token was improbable. Point at a token or tap it for its alternatives. "
        "Mean log-probability: {mean:.3f} nats.",
        "绿色表示模型很有把握，红色表示概率很低。鼠标悬停或点按某个 token 可查看其他候选。"
        "平均对数概率：{mean:.3f} nat。",
    ),
    # tools
    "tools": ("Tools", "工具"),
    "tools_note": (
        "What the model may call. The page runs the tools here and sends their results back.",
        "模型可以调用的工具。工具由本页面执行，结果再交给模型。",
    ),
    "called": ("Called {name}", "调用了 {name}"),
    "result": ("Result", "结果"),
    "running_tool": ("running …", "运行中……"),
    # model and sampling
    "model": ("Model or adapter", "模型或适配器"),
    "model_note": ("Adapters (LoRA) of the server are listed like models.", "服务端的 LoRA 适配器也列在这里。"),
    "sampling": ("Sampling", "采样参数"),
    "temperature": ("Temperature", "温度（temperature）"),
    "temperature_note": (
        "Logits are divided by it: 0 always takes the most probable token, above 1 is more random.",
        "logits 除以该值：0 表示每次取概率最大的 token，大于 1 更随机。",
    ),
    "top_p": ("Top-p", "top-p"),
    "top_p_note": (
        "Samples from the fewest most probable tokens whose probability reaches this; 1: from all.",
        "只从累计概率达到该值的最少候选中采样；1 表示不限制。",
    ),
    "top_k": ("Top-k", "top-k"),
    "top_k_note": (
        "Samples from the k most probable tokens; 0: from all.",
        "只从概率最大的 k 个 token 中采样；0 表示不限制。",
    ),
    "min_p": ("Min-p", "min-p"),
    "min_p_note": (
        "Leaves out tokens with less than this share of the best token's probability; 0: none.",
        "去掉概率低于最大概率这一比例的 token；0 表示不限制。",
    ),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "repetition_penalty_note": (
        "Above 1, tokens that were already used become less likely.",
        "大于 1 时，已出现过的 token 概率降低。",
    ),
    "max_tokens": ("Longest answer, tokens", "回答的最大 token 数"),
    "max_tokens_note": ("The answer is cut there, thoughts included.", "超过即截断，思考过程也计算在内。"),
    "seed": ("Seed", "随机种子"),
    "seed_note": (
        "The same seed and settings give the same answer; empty: a new one each time.",
        "种子和参数相同，回答就相同；留空则每次不同。",
    ),
    "n_earlier": ("Earlier turns sent along", "携带的历史轮数"),
    "n_earlier_note": (
        "How much of the conversation the model sees; 0: the question alone.",
        "模型能看到多少轮历史；0 表示只看当前问题。",
    ),
    "system": ("System message", "系统提示词"),
    "system_note": ("Goes before the conversation; empty: none.", "放在对话之前；留空则没有。"),
    "show_tokens": ("Probabilities of the tokens", "返回 token 概率"),
    "show_tokens_note": (
        "Asks the server for them with the next answers.",
        "之后的回答会同时返回每个 token 的概率。",
    ),
    # runs
    "no_runs": (
        "There is no training run in {directory} yet. One appears here after its first update.",
        "{directory} 中还没有训练记录。训练完成第一次更新后会出现在这里。",
    ),
    "run": ("run", "训练"),
    "which_runs": ("Runs", "选择训练记录"),
    "live": ("Refresh by itself", "自动刷新"),
    "x_axis": ("Horizontal axis", "横轴"),
    "step": ("step", "步数"),
    "seconds": ("seconds", "秒"),
    "n_tokens": ("tokens", "token 数"),
    "progress": (
        "step {step:,} of {total:,}, {left} left; last row {age} ago",
        "第 {step:,} / {total:,} 步，剩余 {left}；{age} 前更新",
    ),
    "progress_over": ("{step:,} steps, complete", "共 {step:,} 步，已完成"),
    "progress_unknown": ("step {step:,}; last row {age} ago", "第 {step:,} 步；{age} 前更新"),
    "curves": ("Curves", "曲线"),
    "samples": ("Samples", "样例"),
    "samples_note": (
        "What the model answered at its validations, newest on the left.",
        "每次验证时模型的回答，最新的在最左边。",
    ),
    "no_samples": ("This run has no samples yet.", "这次训练还没有样例。"),
    "question": ("question", "问题"),
    "expected": ("expected", "标准答案"),
    "monitor": ("Adapter monitor", "适配器监控"),
    "no_monitor": (
        "No figures of an adapter: train_lora.py writes them with --monitor.",
        "没有适配器监控数据：train_lora.py 加上 --monitor 才会记录。",
    ),
    "grad_ratio": ("gradient norm of B : A", "B 与 A 的梯度范数之比"),
    "update_ratio": ("what one step changes of the weight", "单步更新占权重的比例"),
    "delta_ratio": ("|ΔW| / |W|", "|ΔW| / |W|"),
    "effective_rank": ("effective rank of ΔW", "ΔW 的有效秩"),
    "data": ("Data report", "数据报告"),
    "no_data": ("run.yaml does not describe the data.", "run.yaml 中没有数据说明。"),
    "settings": ("Settings", "设置"),
}


# What minillm.compare calls the panels of its curves, in Chinese.
PANELS_ZH = {
    ("train", "loss"): "训练损失（nat）",
    ("valid", "loss"): "验证损失（nat）",
    ("train", "lr"): "学习率",
    ("train", "grad_norm"): "梯度范数",
    ("train", "tokens_per_s"): "每秒 token 数",
    ("train", "gpu_peak_gib"): "显存峰值（GiB）",
    ("train", "cpu_memory_gib"): "进程内存（GiB）",
    ("valid", "bits_per_byte"): "验证：每字节比特数",
    ("valid", "accuracy"): "验证：判断正确的比例",
    ("valid", "margin"): "验证：奖励差",
    ("valid", "kl"): "验证：与参考模型的距离（nat）",
}

# What minillm.compare calls the results of a run, in Chinese.
RESULTS_ZH = {
    "stage": "阶段", "steps": "步数", "training loss": "训练损失", "validation loss": "验证损失",
    "lowest loss": "最低损失", "nats per": "损失单位", "parameters": "参数量", "tokens": "token 数",
    "training time": "训练用时", "tokens/s": "token/秒", "memory": "内存",
}  # fmt: skip


class Words:
    """The texts of one language: ``words("stop")``, with values for braces ``words("imported", n=3)``."""

    def __init__(self, language: str):
        self.language = language
        self._column = list(LANGUAGES).index(language)

    def __call__(self, name: str, /, **values) -> str:
        """Return a text."""
        text = WORDS[name][self._column]
        return text.format(**values) if values else text
