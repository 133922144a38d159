# The words stage in the pocket world (python pocket.py makes it): the connector learns from
# captions which words a picture holds. The LLM gives its tokenizer and its embeddings, and the loss
# does not run it. So the stage takes seconds.
stage = "words"
out = "out/pocket/words"
llm = "data/pocket/pocket-qwen"     # its tokenizer and its E, for words_init
vision_tower = "data/pocket/vision-tower"
words = "data/pocket/words.json"
words_init = "embeds"
hidden = 256
data = "data/pocket/pretrain.json"
images = "data/pocket/images"
global_batch = 16
batch_size = 16
max_steps = 150
connector_lr = 1e-3
warmup = 0.1
words_background = 0.0              # with 0.9 the moved connector was worse, see docs/results.md
dtype = "auto"                      # bfloat16 where the CPU has it: ten times slower elsewhere
workers = 0
log_every = 50
template = "prompted"
