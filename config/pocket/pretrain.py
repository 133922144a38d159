# Stage 1 in the pocket world, after config/pocket/words.py: captions with pocket-qwen, which stays
# frozen.
stage = "pretrain"
out = "out/pocket/pretrain"
init = "out/pocket/words"           # --init= starts from nothing, with the next four
llm = "data/pocket/pocket-qwen"
vision_tower = "data/pocket/vision-tower"
words = "data/pocket/words.json"
hidden = 256
words_loss = 0.05                   # keeps what the words stage has taught
words_background = 0.0
data = "data/pocket/pretrain.json"
images = "data/pocket/images"
global_batch = 16                   # 400 steps: in a minute, more small steps beat fewer large ones
batch_size = 16
epochs = 2
connector_lr = 1e-3
warmup = 0.1
dtype = "auto"                      # bfloat16 where the CPU has it: ten times slower elsewhere
attention = "eager"                 # short sequences on a CPU: faster than sdpa
workers = 0
log_every = 10
template = "prompted"               # the prompt asks for a caption, so the connector need not
