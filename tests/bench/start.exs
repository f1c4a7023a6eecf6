# From start_link/1 to the first gradient, over a Python that only imports torch and tinker.
#
#     start   an L2 term of 1,000 values, median of 5
#
#     mix run tests/bench/start.exs

for file <- ["figures.exs", "batch.exs"], do: Code.require_file(file, __DIR__)

alias Bench.{Batch, Figures}
alias Tinkex.CustomLoss

batch = Batch.new(1_000)
python = System.fetch_env!("TINKEX_CUSTOM_LOSS_PYTHON")

first_gradient = fn ->
  {:ok, pool} = CustomLoss.start_link([])
  {:ok, _output} = CustomLoss.compute(pool, nil, Batch.logprobs(batch), Batch.options(:l2))
  # milliseconds
  Supervisor.stop(pool)
end

imports = fn -> {"", 0} = System.cmd(python, ["-c", "import torch, tinker"]) end

ms = Figures.medians("start", [first_gradient: first_gradient, imports: imports], 5)
Figures.figure("start", ms[:first_gradient] / ms[:imports], 0.6)
