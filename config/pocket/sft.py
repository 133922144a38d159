# Stage 2 in the pocket world: connector and LLM on questions.
stage = "sft"
out = "out/pocket/sft"
init = "out/pocket/pretrain"
data = "data/pocket/sft.json"
images = "data/pocket/images"
image_mode = "pad"
template = "chat"
group = True
global_batch = 32
batch_size = 32
connector_lr = 2e-3
llm_lr = 1e-3
warmup = 0.1
dtype = "bfloat16"
attention = "eager"                 # short sequences on a CPU: faster than sdpa
workers = 0
log_every = 10
