"""What the demo's report says, in English and Chinese."""

from minillm.reports.page import LANGUAGES

# Name: (English, Chinese).
WORDS = {
    "title": ("The demo, stage by stage", "演示：逐个阶段"),
    "intro": (
        "A toy world of short Chinese and English texts, a tokenizer and every stage of training, made on this "
        "machine by make demo. {parameters} parameters, {time} of training. Written on {date}.",
        "一个由中英文短文本构成的小世界、一个分词器和所有训练阶段，都由 make demo 在这台机器上完成。"
        "参数量 {parameters}，训练共用 {time}。生成于 {date}。",
    ),
    "read_more": ("Read more: ", "延伸阅读："),
    "separator": (", ", "、"),
    # the table
    "table": ("All stages", "各阶段汇总"),
    "table_note": (
        "Each figure before and after its stage, on held-out questions. Shares are better when higher. Nats above the "
        "floor are better when lower: at 0 a model is as good as any can be.",
        "各项指标在该阶段之前与之后的数值，都在没见过的问题上测得。百分比越高越好；高出下限的奈特数越低越好，"
        "0 就是任何模型所能达到的极限。",
    ),
    "metric": ("figure", "指标"),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    "complete": ("{steps} steps in {time}", "{steps} 步，用时 {time}"),
    "shortened": ("shortened to {steps} steps in {time}", "缩短为 {steps} 步，用时 {time}"),
    "unfinished": ("not finished: step {steps} of {total}", "未完成：第 {steps} 步，共 {total} 步"),
    "missing": (
        "missing: there is no run in {run}; make demo trains it",
        "缺失：{run} 里没有训练记录；运行 make demo 来训练",
    ),
    "not_measured": (", not measured", "，未评测"),
    # a stage
    "loss": ("loss, nats per {unit[0]}", "损失（奈特/{unit[1]}）"),
    "distance": ("training: distance from the teacher, nats per token", "训练：与教师的距离（奈特/词元）"),
    "training": ("training", "训练"),
    "validation": ("validation", "验证"),
    "floor": ("floor {value:.3f}", "下限 {value:.3f}"),
    "lr": ("learning rate", "学习率"),
    "step": ("step", "步数"),
    "bits_per_byte": ("validation: bits per byte", "验证：每字节比特数"),
    "accuracy": ("validation: share of pairs on the right side", "验证：偏好判断正确的比例"),
    "rewards": ("validation: rewards", "验证：奖励"),
    "reward_chosen": ("chosen reply", "被选中的回答"),
    "reward_rejected": ("rejected reply", "被拒绝的回答"),
    "kl": ("validation: distance from the reference, nats", "验证：与参考模型的距离（奈特）"),
    "samples": ("Samples", "样例"),
    "samples_note": (
        "Questions at regular distances in the test file; none is picked by hand.",
        "题目按固定间隔从测试集中抽取，没有人工挑选。",
    ),
    "texts_note": (
        "The beginnings of the first validation texts, and how the model continues them (sampled, temperature 0.7).",
        "取验证集最前面几篇文本的开头，让模型续写（采样，温度 0.7）。",
    ),
    "no_samples": ("No samples: their files are missing.", "没有样例：缺少相应的文件。"),
    "expected": ("expected", "参考"),
    "empty": ("(empty)", "（空）"),
    "before_random": ("random weights", "随机权重"),
    "before_hard": ("without a teacher", "没有教师"),
    "after_teacher": ("with a teacher", "有教师"),
    "before_direct": ("at once", "直接回答"),
    "after_steps": ("step by step", "逐步推理"),
    "run_page": ("page of this run", "这次训练的页面"),
    "compared": ("For comparison: {run[0]}", "用作对照：{run[1]}"),
    # times
    "times": ("Times", "用时"),
    "run": ("run", "训练"),
    "steps": ("steps", "步数"),
    "tokens": ("tokens", "词元数"),
    "time": ("time", "用时"),
    "tokens_per_s": ("tokens/s", "词元/秒"),
    "all_training": ("all training", "训练合计"),
    "whole": ("the whole demo until this page", "从开始到生成本页"),
    "whole_note": (
        "The rest: installation where needed, the data, the tokenizer, evaluation, and starting programs.",
        "其余时间用于安装依赖（如果需要）、生成数据、训练分词器、评测和启动程序。",
    ),
    # data
    "data": ("The data", "数据"),
    "data_note": (
        "Written by make_demo.py from seed {seed}; the same seed gives the same bytes.",
        "由 make_demo.py 用种子 {seed} 生成，种子相同则文件逐字节相同。",
    ),
    "data_small": (
        "Shortened: {n} texts for pretraining, where the demo has {usual}.",
        "数据已缩短：预训练文本 {n} 篇，完整的演示有 {usual} 篇。",
    ),
    "no_data": (
        "No data in {path}: python dataset/make_demo.py writes it.",
        "{path} 里没有数据，可以运行 python dataset/make_demo.py 生成。",
    ),
    "file": ("file", "文件"),
    "records": ("records", "记录数"),
    "content": ("content", "内容"),
    "kinds": ("Kinds of text", "文本种类"),
    "kinds_note": (
        "Shares of the pretraining texts, and the floor of each kind: the entropy of its texts.",
        "各类文本在预训练数据中的占比，以及各自的下限，也就是文本的熵。",
    ),
    "kind": ("kind", "种类"),
    "share": ("share", "占比"),
    "floor_per_byte": ("floor, nats/byte", "下限（奈特/字节）"),
    "distribution": ("Tokens", "词元分布"),
    "distribution_note": (
        "What the model learns to predict: the tokens that are targets, in pretraining all of them, in fine-tuning "
        "those of the answers.",
        "模型要预测的词元：预训练时是全部词元，微调时只有回答部分。",
    ),
    "texts": ("pretraining texts", "预训练文本"),
    "chats": ("conversations", "对话"),
    "corpus": (
        "{targets} targets in {records} records, {bytes:.2f} bytes of text each, {vocabulary} tokens in the vocabulary",
        "{records} 条记录，{targets} 个目标词元，平均每个 {bytes:.2f} 字节，词表大小 {vocabulary}",
    ),
    "ranks": ("share of a token, by its rank", "各词元的占比（按频率排名）"),
    "rank": ("rank", "排名"),
    "frequent": ("most frequent targets", "最常见的目标词元"),
    "lengths": ("length of a record in tokens", "每条记录的长度（词元）"),
    "no_tokens": (
        "No distribution of tokens: the data or the tokenizer is missing.",
        "没有词元分布：缺少数据或分词器。",
    ),
}  # fmt: skip

UNITS = {"token": ("token", "词元"), "pair": ("pair", "偏好对"), "reply": ("reply", "回答")}

# The figures of demo_table.py, in Chinese.
METRICS_ZH = {
    "nats/token above the floor (before: guessing)": "高出下限，奈特/词元（之前：随机猜测）",
    "tasks, exact match": "各任务，精确匹配率",
    "who it is, exact match": "“你是谁”，精确匹配率",
    "chosen reply more probable": "被选中的回答概率更高的比例",
    "free answers like the chosen reply": "自由回答更像被选中的回答的比例",
    "student, nats/token above the floor (before: hard labels)": "学生模型高出下限，奈特/词元（之前：只用硬标签）",
    "problems, exact match (before: trained to answer at once)": "题目，精确匹配率（之前：训练成直接回答）",
    "answers that have the form": "格式正确的回答比例",
    "calls, exact match": "工具调用，精确匹配率",
    "answers after calls, exact match": "调用之后的回答，精确匹配率",
}

# Stage: its title, and what it does.
STAGES = {
    "pretrain": (
        ("Pretraining", "预训练"),
        (
            "A model with random weights learns to predict the next token of plain texts. A grammar wrote them and "
            "knows their exact probability, so the loss has a floor that no model can go below: the dashed line.",
            "从随机权重出发，学习预测普通文本的下一个词元。文本由一套语法生成，概率精确可知，所以损失有一条任何模型都越不过的下限，"
            "即图中的虚线。",
        ),
    ),
    "full_sft": (
        ("Fine-tuning", "监督微调"),
        (
            "Conversations teach the model to answer; only the answers count in the loss. Neither the items nor the "
            "phrasings of the questions below were in training.",
            "用对话教模型回答问题，只有回答部分计入损失。下面这些题目和问法，训练时都没有出现过。",
        ),
    ),
    "lora": (
        ("LoRA", "LoRA"),
        (
            "A small adapter tells the model who it is. Old conversations are mixed in, so that it keeps its other "
            "skills.",
            "用一个小适配器让模型知道自己是谁。训练时混入旧对话，好让它保住其他能力。",
        ),
    ),
    "dpo": (
        ("DPO", "DPO"),
        (
            "Pairs of replies teach the model to prefer a full sentence to a single word. ✓: more like the chosen "
            "reply than like the rejected one. The loss includes that of the chosen reply's tokens, "
            "so it does not start at ln 2.",
            "用成对的回答教模型说完整的句子，而不是只吐一个词。✓ 表示更接近被选中的回答。"
            "损失里还加上了被选中的回答自己每个词元的损失，所以起点不是 ln 2。",
        ),
    ),
    "distill": (
        ("Distillation", "知识蒸馏"),
        (
            "A student with a third of the parameters learns from the pretrained model's probabilities; its training "
            "loss is the distance from them, its validation loss that of the texts. Before: the same student, trained "
            "for as many steps on the texts alone.",
            "参数量为三分之一的学生模型，从预训练模型给出的概率中学习：训练损失是与教师的距离，验证损失仍按文本计算。"
            "“之前”是同样大小的学生只用文本训练同样多步的结果。",
        ),
    ),
    "reason": (
        ("Reasoning", "推理"),
        (
            "Five operations modulo 10, worked out one by one between <think> tags. Before: a model that was trained "
            "on the same problems to answer at once.",
            "模 10 的五步运算，在 <think> 标签里一步一步算。“之前”是用同样的题目训练、直接给出答案的模型。",
        ),
    ),
    "tools": (
        ("Tools", "工具调用"),
        (
            "The model learns to call functions and to answer with what they return, and to say so where none can "
            "help.",
            "模型学习调用函数，并根据返回的结果作答；没有合适的函数时，就如实说明。",
        ),
    ),
}  # fmt: skip

# Runs that a stage is compared with.
OTHER_RUNS = {
    "lora/identity_alone_128": ("LoRA without old conversations", "不混入旧对话的 LoRA"),
    "pretrain_64": ("the student without a teacher", "没有教师的学生模型"),
    "direct/full_sft_128": ("the model that answers at once", "直接回答的模型"),
}

# Kinds of text of the demo world.
KINDS = {
    "facts": ("facts", "事实"), "stories": ("stories", "故事"), "addition": ("addition", "加法"),
    "sorting": ("sorting", "排序"), "counting": ("counting letters", "数字母"),
    "translation": ("word pairs", "词语对照"), "talk": ("talks", "对话"),
    "chains": ("chains modulo 10", "模 10 连续运算"),
}  # fmt: skip

# File of the data: what is in it.
FILES = {
    "pretrain_train": ("texts with their exact probability", "预训练文本，附精确概率"),
    "pretrain_valid": ("the same, held out", "同上，验证集"),
    "sft_train": ("conversations of nine tasks", "九类任务的对话"),
    "sft_valid": ("the same, held out", "同上，验证集"),
    "sft_test": ("other items and other phrasings", "测试集，题目和问法都不同"),
    "dpo_train": ("pairs of replies", "成对的回答"),
    "dpo_test": ("the same, other facts", "同上，换用别的事实"),
    "identity_train": ("who the model is", "模型是谁"),
    "identity_test": ("the same, other phrasings", "同上，换用别的问法"),
    "reason_train": ("problems with steps", "带步骤的运算题"),
    "reason_test": ("other problems", "别的题目"),
    "direct_train": ("the problems of reason_train, answers alone", "与 reason_train 相同的题目，只给答案"),
    "tools_train": ("questions with tools, and old conversations", "需要工具的问题，混有旧对话"),
    "tools_test": ("other questions with tools", "别的需要工具的问题"),
    "notes": ("lines that the tool search reads", "工具 search 读取的文本"),
}  # fmt: skip


def texts(name: str, **values) -> dict[str, str]:
    """Return a text of ``WORDS`` in each language, with values for its braces."""
    return in_languages(WORDS[name], **values)


def in_languages(pair: tuple[str, str], **values) -> dict[str, str]:
    """Return an English and a Chinese text by language."""
    return {language: text.format(**values) for language, text in zip(LANGUAGES, pair, strict=True)}
