"""What the explanation says, in English and Chinese."""

WORDS = {
    "en": {
        "title": "From a text to the next token",
        "tokens": "Tokens",
        "tokens_note": "The tokenizer cuts the text into pieces of its vocabulary; the model sees only their numbers.",
        "way": "Through the model",
        "way_note": "Every token is a vector of {hidden} numbers, the stream. Each part reads it and adds to it; the "
        "length of the vectors (mean over the tokens) shows how much. The guess is what the model would say if it "
        "ended there.",
        "part": "part", "shape": "shape", "parameters": "parameters", "flops": "FLOPs", "bytes": "bytes",
        "time": "time", "norm": "length", "guess": "guess",
        "embedding": "embedding", "attention": "attention", "feed-forward": "feed-forward", "experts": "experts",
        "norm_part": "final norm", "output": "output layer", "total": "total",
        "attention_maps": "Attention",
        "attention_note": "Row: a token. Column: an earlier token that it takes from. Dark: much. Point at a square, "
        "or tap it, for its value.",
        "layer": "layer", "head": "head", "all_heads": "all heads (mean)",
        "experts_note": "Experts that the router chose for each token.",
        "next": "The next token",
        "next_note": "The output layer compares the last vector with each of the {vocabulary} tokens. Entropy: "
        "{entropy:.2f} nats, as uncertain as an even choice among {choices:.1f} tokens.",
        "probability": "probability",
    },
    "zh": {
        "title": "从一段文本到下一个词元",
        "tokens": "词元",
        "tokens_note": "分词器把文本切成词表里的片段，模型看到的只有它们的编号。",
        "way": "穿过模型",
        "way_note": "每个词元是一个有 {hidden} 个数的向量，合起来叫残差流。每个部件读它，再把结果加回去；"
        "向量的长度（对词元取平均）显示加了多少。"
        "“猜测”是模型在这里就结束时会说的词元。",
        "part": "部件", "shape": "形状", "parameters": "参数量", "flops": "FLOPs", "bytes": "字节",
        "time": "时间", "norm": "长度", "guess": "猜测",
        "embedding": "词嵌入", "attention": "注意力", "feed-forward": "前馈层", "experts": "专家层",
        "norm_part": "最后的归一化", "output": "输出层", "total": "合计",
        "attention_maps": "注意力",
        "attention_note": "行是一个词元，列是它读取的更早的词元，颜色越深读得越多。"
        "把鼠标移到方格上，或者点一下，就能看到数值。",
        "layer": "层", "head": "头", "all_heads": "所有头的平均",
        "experts_note": "路由器为每个词元选出的专家。",
        "next": "下一个词元",
        "next_note": "输出层拿最后一个向量和 {vocabulary} 个词元逐一比较。熵是 {entropy:.2f} 奈特，"
        "相当于在 {choices:.1f} 个词元里均匀地选一个。",
        "probability": "概率",
    },
}  # fmt: skip
