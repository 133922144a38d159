# Stage 1 in the pocket world (python pocket.py makes it): a LangBridge on pocket-qwen. Every number here was measured.
stage = "pretrain"
out = "out/pocket/pretrain"
llm = "data/pocket/pocket-qwen"
vision_tower = "data/pocket/vision-tower"
words = "data/pocket/words.json"
hidden = 256
data = "data/pocket/pretrain.json"
images = "data/pocket/images"
global_batch = 32
batch_size = 32
epochs = 2
connector_lr = 1e-3
dtype = "bfloat16"
attention = "eager"                 # short sequences on a CPU: faster than sdpa
workers = 0
log_every = 10
template = "prompted"               # the prompt in words asks for a caption, so that the connector need not
