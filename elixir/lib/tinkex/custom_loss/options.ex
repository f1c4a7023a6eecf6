defmodule Tinkex.CustomLoss.Options do
  @moduledoc false
  # Every option of the pool and of a call: its type, its default, and what it protects from, as a
  # `Tinkex.CustomLoss.Schema`, of which the documentation of `Tinkex.CustomLoss` is made.

  alias Tinkex.CustomLoss.{Environment, Regularizer, Schema, Terms}

  @start [
    name: [
      type: :name,
      doc: "what callers say: an atom, `{:global, term}` or `{:via, module, term}`. Without one, \
use the pid that `start_link/1` returns."
    ],
    python: [
      type: :executable,
      doc:
        "the Python to run, as a path or a name on PATH. Without it, the first there is of: the \
environment variable `TINKEX_CUSTOM_LOSS_PYTHON`, the environment that \
`Tinkex.CustomLoss.Release` put into the release, the one in `VIRTUAL_ENV`, `.venv` in the current \
directory, `python3` on PATH."
    ],
    load: [
      type: :strings,
      default: [],
      doc:
        "Python modules, or paths of `.py` files, whose functions may be named in `:fn`. The only \
door: nothing that a call says can import anything."
    ],
    python_path: [
      type: :strings,
      default: [],
      doc: "directories where Python looks for the modules in `:load`, before its own."
    ],
    env: [
      type: :env,
      default: [],
      secret: true,
      doc:
        "environment variables of the Python processes, beside those of the BEAM: a map or list \
of `{name, value}`; `nil` removes one that would be inherited."
    ],
    cd: [
      type: :directory,
      doc: "the directory that the Python processes run in. By default that of the BEAM."
    ],
    workers: [
      type: :pos_integer,
      default: 1,
      doc: "how many Python processes. More of them compute at the same time, and one that dies \
leaves others to answer."
    ],
    threads: [
      type: :pos_integer,
      default: 1,
      doc:
        "torch threads of each worker. Several workers that each take all cores are slower than \
one."
    ],
    max_in_flight: [
      type: :pos_integer,
      default: 4,
      doc:
        "requests that one worker has at a time. The next one arrives while this one computes; \
more of them only take memory."
    ],
    max_queue: [
      type: :non_neg_integer,
      default: 100,
      doc: "requests that may wait for room at a worker. Beyond it, calls return \
`Tinkex.CustomLoss.OverloadedError` at once, instead of a queue that grows until memory ends."
    ],
    max_frame: [
      type: {:integer, 1_048_576, 0xFFFF_FFFF},
      default: 1_073_741_824,
      doc:
        "bytes of the largest message in either direction. A larger request is refused before it \
is sent."
    ],
    shared_memory: [
      type: {:in, [:auto, true, false]},
      default: :auto,
      doc:
        "whether the tensors of large requests, from 128 KiB on, go through memory that a worker \
shares with the BEAM, and not through its pipe. `:auto` does so where the system can, which is Linux, \
and `true` makes it an error where it cannot. See docs/security.md for who can read it."
    ],
    max_rss: [
      type: :bytes,
      default: :infinity,
      doc:
        "bytes of resident memory of a worker, or `:infinity`. One that a ping finds above it is \
started anew when it has finished what it has: terms leak, and so do caches of native code. A \
worker starts with 200 to 300 MB, and does not if that is more than two thirds of this."
    ],
    start_timeout: [
      type: {:integer, 1, 0x7FFF_FFFF},
      default: 60_000,
      doc: "milliseconds that a worker may take to import torch and what is in `:load`. One that \
hangs there is killed and started again."
    ],
    await_ready: [
      type: :boolean,
      default: false,
      doc:
        "whether `start_link/1` returns only when the first worker is ready, with the error if \
none can be. By default it returns at once, calls wait for a worker within their timeout, and a \
Python that does not start shows in the log and in what calls return."
    ],
    grace: [
      type: :pos_integer,
      default: 2_000,
      doc:
        "milliseconds from the moment that a request is cancelled, by its deadline or since its \
caller died, until the worker that still computes it is killed and replaced. It keeps a loop that \
never ends from holding a worker; what else that worker had is retried on another."
    ],
    ping_interval: [
      type: :pos_integer,
      default: 5_000,
      doc: "milliseconds between signs of life. A worker with nothing to do that misses two is \
killed and replaced, one that computes after twelve: Python gives them while a term computes, \
unless C code holds its lock."
    ],
    backoff: [
      type: :backoff,
      default: {100, 30_000},
      doc:
        "`{first, longest}`: milliseconds before a worker that ended is started again, doubled \
each time until it answers a request. It keeps a broken environment from using up the machine."
    ],
    record: [
      type: :record,
      doc: "where the Python processes record, by default nowhere: `[dir: \"runs/first\", keep: \
:failures, keep_bytes: 256_000_000]`. In `dir`, which is relative to that of the BEAM, they write the \
record of every step to `metrics.jsonl`, what is composed to `config.json`, and those steps to \
`steps` that `:keep` says: `:failures` (the default), `{:every, n}` (those too) or `:all`. \
`python -m tinker_custom_loss replay` computes such a step again, and `report` draws them all."
    ],
    log_level: [
      type: {:in, [:debug, :info, :warning, :error, :critical]},
      default: :info,
      doc: "the lowest level of Python's `logging` that is sent to Elixir's Logger, where it has \
the metadata `:python_logger`, `:term` and `:worker`."
    ]
  ]

  @call [
    base_loss: [
      type: :any,
      doc:
        "the unweighted term: a name (`:nll`, `\"my_losses:dpo\"`), `{name, params}`, or a map \
or keyword list with `:fn`, `:params` and `:reduction`. By default none."
    ],
    regularizers: [
      type: :any,
      default: [],
      doc: "a list of `Tinkex.CustomLoss.Regularizer`s, or maps or keyword lists with their keys."
    ],
    step: [
      type: :non_neg_integer,
      doc:
        "the training step, from 0: the record's `schedule_step`, and what weights that are a \
function are called with. Nobody counts it for you; without one it is nil in the record, such a \
weight is an error, and a pool that records (`:record`) leaves the step out and says so in the log."
    ],
    gradients: [
      type: :boolean,
      default: true,
      doc: "`false` evaluates losses and metrics alone; `gradients` is then nil."
    ],
    totals: [
      type: :totals,
      doc:
        "of the whole step, where these datums are a part of it: what \
`Tinkex.CustomLoss.totals/3` returned. The gradients of the parts then add up to that of the step."
    ],
    timeout: [
      type: :timeout,
      default: 30_000,
      doc:
        "milliseconds for everything: waiting for a worker, sending, computing. At the deadline \
the call returns `Tinkex.CustomLoss.TimeoutError`, and the computation is cancelled. `:infinity` \
waits for a term that never returns as long as that takes."
    ]
  ]

  @train @call ++
           [
             metrics: [
               type: {:in, [:nested, :flat]},
               default: :nested,
               doc: "the form in which the record joins the metrics of the training client: \
`:flat` for loggers that take names and numbers, see `Tinkex.CustomLoss.Output.flat/1`."
             ],
             client_opts: [
               type: :keyword,
               default: [],
               doc: "options of the training client's own `forward/4` and `forward_backward/4`."
             ]
           ]

  # The base loss is the server's.
  @native Keyword.drop(@train, [:base_loss, :gradients])

  @sandbox Keyword.take(@start, [:name, :python, :load, :python_path, :env, :cd, :threads]) ++
             [
               seed: [type: :integer, default: 0, doc: "of the model's initial parameters."],
               state: [
                 type: :string,
                 doc: "the directory where `save_state/3` saves, so that another sandbox can \
go on. By default what is saved ends with this one."
               ],
               start_timeout: @start[:start_timeout]
             ]

  @sample [
    num_samples: [type: :pos_integer, default: 1],
    prompt_logprobs: [type: :boolean, default: false]
  ]

  @setup [
    dir: [
      type: :string,
      default: ".venv",
      doc: "where to make it. `.venv` of the current directory is where pools find it untold."
    ],
    python: [
      type: :executable,
      doc: "the Python to make it with, 3.11 or newer: a path, or a name on PATH. By default the \
first that is new enough of `python3`, `python3.14` and so on."
    ],
    torch: [
      type: :torch,
      default: :default,
      doc:
        "which PyTorch. `:default` is the newest, which on Linux brings some gigabytes of CUDA \
with it. `:cpu` is one without, of some 200 MB. A version such as `\"==2.13.0\"` is that one, in \
the build of the index that is asked."
    ],
    torch_index: [
      type: :string,
      doc:
        "the URL of the index that has PyTorch: that of the CPU builds where `uv` is not there \
to know it, one of a CUDA version, or a mirror."
    ],
    extras: [
      type: {:list_of, ~w(sandbox dask)},
      default: [],
      doc: "extras of the Python package: `\"sandbox\"`, for its server; `\"dask\"`."
    ],
    args: [
      type: :strings,
      default: [],
      doc: "more arguments for `pip install` or `uv pip install`: other packages that your terms \
import, a constraint, an index."
    ],
    verbose: [
      type: {:in, [true, false]},
      default: false,
      doc: "whether all is shown that the installer says; without it, only when it fails."
    ]
  ]

  @check Keyword.take(@call, [:base_loss, :regularizers, :step])
  @totals Keyword.take(@call, [:base_loss, :regularizers, :timeout])

  @doc "The validated options of a pool, as a map."
  def start!(opts),
    do: opts |> Schema.validate!(@start, "Tinkex.CustomLoss") |> hide_environment()

  @doc "The validated options of `compute/4`, as a map."
  def call!(opts), do: call!(opts, @call, "Tinkex.CustomLoss.compute/4")

  @doc "The validated timeout of a function of `Tinkex.CustomLoss` that takes no other option."
  def timeout!(timeout, where) do
    with {:expected, expected} <- Schema.cast(:timeout, timeout) do
      raise ArgumentError,
            "invalid value for the timeout of Tinkex.CustomLoss.#{where}: expected #{expected}, " <>
              "got: #{inspect(timeout)}"
    end

    timeout
  end

  @doc "The validated options of `forward_backward_custom/4`, as a map."
  def train!(opts), do: train!(opts, @train, "Tinkex.CustomLoss.forward_backward_custom/4")

  @doc "The validated options of `forward_backward/5`, as a map."
  def native!(opts) do
    where = "Tinkex.CustomLoss.forward_backward/5"

    if Schema.validate!(opts, @native, where).regularizers in [[], nil] do
      raise ArgumentError,
            "#{where} adds regularizers to a loss of the server's: give :regularizers with at least " <>
              "one; without any, call the training client's own forward_backward/4"
    end

    train!(opts, @train, where)
  end

  @doc "The validated options of `loss_fn/2`, as a map."
  def loss_fn!(opts),
    do: train!(opts, Keyword.delete(@train, :client_opts), "Tinkex.CustomLoss.loss_fn/2")

  defp train!(opts, schema, where) do
    options = call!(opts, schema, where)

    unless options.gradients do
      raise ArgumentError,
            "#{where} trains on the gradient; for losses alone, with gradients: false, " <>
              "call compute/4"
    end

    options
  end

  @doc "The validated options of a sandbox, as a map."
  def sandbox!(opts),
    do: opts |> Schema.validate!(@sandbox, "Tinkex.CustomLoss.Sandbox") |> hide_environment()

  defp hide_environment(options), do: Map.update!(options, :env, &Environment.new/1)

  @doc "The validated options of `setup!/1`, as a map."
  def setup!(opts), do: Schema.validate!(opts, @setup, "Tinkex.CustomLoss.setup!/1")

  @doc "The validated options of `totals/3`, as a map. Its terms need no weight yet."
  def totals!(opts) do
    where = "Tinkex.CustomLoss.totals/3"
    options = Schema.validate!(opts, @totals, where)
    regularizers = options.regularizers |> Regularizer.list!() |> Enum.map(&%{&1 | weight: 1.0})

    something!(%{
      options
      | base_loss: Terms.base_loss!(options.base_loss),
        regularizers: regularizers
    })
  end

  @doc "The validated options of a sandbox's samples, as a map."
  def sample!(opts),
    do: Schema.validate!(opts, @sample, "Tinkex.CustomLoss.Sandbox.sample/4")

  @doc "The validated options of a sandbox's gradient check, as a map."
  def check!(opts),
    do: call!(opts, @check, "Tinkex.CustomLoss.Sandbox.check_gradient/3")

  def start_docs, do: Schema.docs(@start)
  def call_docs, do: Schema.docs(@call)
  def train_docs, do: Schema.docs(@train -- @call)
  def setup_docs, do: Schema.docs(@setup)
  def sandbox_docs, do: Schema.docs(@sandbox)

  # What is computed, from the options of a call whose step is known.
  defp call!(opts, schema, where) do
    options = Schema.validate!(opts, schema, where)

    regularizers =
      options.regularizers
      |> Regularizer.list!()
      |> Enum.map(&Regularizer.at_step(&1, options.step))

    base_loss = Terms.base_loss!(options.base_loss)
    something!(%{options | base_loss: base_loss, regularizers: regularizers})
  end

  defp something!(options) do
    if options.base_loss == nil and options.regularizers == [] do
      raise ArgumentError,
            "there is nothing to compute: give :base_loss, :regularizers with at least one, or both"
    end

    options
  end
end
