# Stage 2 in the pocket world: connector and LLM on questions.
stage = "sft"
out = "out/pocket/sft"
init = "out/pocket/pretrain"
data = "data/pocket/sft.json"
images = "data/pocket/images"
image_mode = "pad"
template = "chat"
group = True
global_batch = 8                    # 441 steps
batch_size = 8
connector_lr = 2e-4                 # a LangBridge can see by now: a higher rate undoes that
llm_lr = 5e-4
warmup = 0.1
dtype = "auto"                      # bfloat16 where the CPU has it: ten times slower elsewhere
attention = "eager"                 # short sequences on a CPU: faster than sdpa
workers = 0
log_every = 10
