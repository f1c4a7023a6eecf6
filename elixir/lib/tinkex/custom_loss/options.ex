defmodule Tinkex.CustomLoss.Options do
  @moduledoc false
  # Every option of the pool and of a call: its type, its default, and what it protects from. The
  # documentation of `Tinkex.CustomLoss` is made from here.

  alias Tinkex.CustomLoss.{Regularizer, Terms}

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
environment variable `TINKEX_CUSTOM_LOSS_PYTHON`, the environment in `VIRTUAL_ENV`, `.venv` in the \
current directory, `python3` on PATH."
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
    max_rss: [
      type: :bytes,
      default: :infinity,
      doc:
        "bytes of resident memory of a worker, or `:infinity`. One that a ping finds above it is \
started anew when it has finished what it has: terms leak, and so do caches of native code."
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
    log_level: [
      type: {:in, [:debug, :info, :warning, :error, :critical]},
      default: :info,
      doc: "the lowest level of Python's `logging` that is sent to Elixir's Logger, where it has \
the metadata `:python_logger`, `:term` and `:worker`."
    ]
  ]

  @call [
    base_loss: [
      doc: "the unweighted term: a name (`:nll`, `\"my_losses:dpo\"`), `{name, params}`, or \
`%{fn: name, params: params}`. By default none."
    ],
    regularizers: [
      default: [],
      doc: "a list of `Tinkex.CustomLoss.Regularizer`s, or maps or keyword lists with their keys."
    ],
    step: [
      type: :non_neg_integer,
      default: 0,
      doc: "the training step, for telemetry."
    ],
    gradients: [
      type: :boolean,
      default: true,
      doc: "`false` evaluates losses and metrics alone; `gradients` is then nil."
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
               doc: "the form in which the telemetry joins the metrics of the training client: \
`:flat` for loggers that take names and numbers, see `Tinkex.CustomLoss.Output.flat/1`."
             ],
             client_opts: [
               type: :keyword,
               default: [],
               doc: "options of the training client's own `forward/4` and `forward_backward/4`."
             ]
           ]

  @sandbox Keyword.take(@start, [:name, :python, :load, :python_path, :env, :cd, :threads]) ++
             [
               seed: [type: :integer, default: 0, doc: "of the model's initial parameters."],
               start_timeout: @start[:start_timeout]
             ]

  @check Keyword.take(@call, [:base_loss, :regularizers, :step])

  @doc "The validated options of a pool, as a map."
  def start!(opts) do
    opts |> validate!(@start, "Tinkex.CustomLoss") |> hide_environment()
  end

  @doc "The validated options of `compute/4`, as a map."
  def call!(opts), do: opts |> validate!(@call, "Tinkex.CustomLoss.compute/4") |> terms!()

  @doc "The validated timeout of `terms/2`."
  def timeout!(timeout) do
    with expected when is_binary(expected) <- problem(:timeout, timeout) do
      raise ArgumentError,
            "invalid value for the timeout of Tinkex.CustomLoss.terms/2: expected #{expected}, " <>
              "got: #{inspect(timeout)}"
    end

    timeout
  end

  @doc "The validated options of `forward_backward_custom/4`, as a map."
  def train!(opts), do: train!(opts, @train, "Tinkex.CustomLoss.forward_backward_custom/4")

  @doc "The validated options of `loss_fn/2`, as a map."
  def loss_fn!(opts),
    do: train!(opts, Keyword.delete(@train, :client_opts), "Tinkex.CustomLoss.loss_fn/2")

  defp train!(opts, schema, where) do
    options = opts |> validate!(schema, where) |> terms!()

    unless options.gradients do
      raise ArgumentError,
            "#{where} trains on the gradient; for losses alone, with gradients: false, " <>
              "call compute/4"
    end

    options
  end

  @doc "The validated options of a sandbox, as a map."
  def sandbox!(opts),
    do: opts |> validate!(@sandbox, "Tinkex.CustomLoss.Sandbox") |> hide_environment()

  # A report of a crash shows what its process was started with, and an environment holds keys.
  defp hide_environment(options), do: Map.update!(options, :env, &fn -> &1 end)

  @doc "The validated options of a sandbox's gradient check, as a map."
  def check!(opts),
    do: opts |> validate!(@check, "Tinkex.CustomLoss.Sandbox.check_gradient/3") |> terms!()

  def start_docs, do: docs(@start)
  def call_docs, do: docs(@call)
  def train_docs, do: docs(@train -- @call)
  def sandbox_docs, do: docs(@sandbox)

  defp docs(schema) do
    Enum.map_join(schema, "\n", fn {key, option} ->
      default =
        if Keyword.has_key?(option, :default),
          do: " Defaults to `#{inspect(option[:default])}`.",
          else: ""

      "  * `:#{key}` - #{option[:doc]}#{default}\n"
    end)
  end

  defp terms!(options) do
    options = %{
      options
      | base_loss: Terms.base_loss!(options.base_loss),
        regularizers: Regularizer.list!(options.regularizers)
    }

    if options.base_loss == nil and options.regularizers == [] do
      raise ArgumentError,
            "there is nothing to compute: give :base_loss, :regularizers with at least one, or both"
    end

    options
  end

  defp validate!(opts, schema, where) do
    unless Keyword.keyword?(opts) do
      raise ArgumentError, "#{where} takes a keyword list of options, got: #{inspect(opts)}"
    end

    for {key, value} <- opts do
      option =
        schema[key] ||
          raise ArgumentError,
                "#{where} has no option #{inspect(key)}; " <>
                  "its options are #{inspect(Keyword.keys(schema))}"

      with expected when is_binary(expected) <- problem(option[:type], value) do
        raise ArgumentError,
              "invalid value for :#{key} of #{where}: expected #{expected}, " <>
                "got: #{inspect(shown(key, value))}"
      end
    end

    Map.new(schema, fn {key, option} -> {key, Keyword.get(opts, key, option[:default])} end)
  end

  # An environment holds keys, and the message may end in a log.
  defp shown(:env, variables) when is_list(variables) or is_map(variables) do
    for variable <- variables do
      with {name, _value} <- variable, do: name
    end
  end

  defp shown(_key, value), do: value

  # What was expected, or nil if the value is that.
  defp problem(nil, _value), do: nil

  defp problem(:pos_integer, value),
    do: unless(is_integer(value) and value > 0, do: "a positive integer")

  defp problem(:non_neg_integer, value),
    do: unless(is_integer(value) and value >= 0, do: "an integer that is not negative")

  defp problem({:integer, low, high}, value),
    do: unless(is_integer(value) and value in low..high, do: "an integer from #{low} to #{high}")

  defp problem(:integer, value), do: unless(is_integer(value), do: "an integer")

  # A receive takes no longer ones.
  @longest 0xFFFF_FFFF

  defp problem(:timeout, :infinity), do: nil

  defp problem(:timeout, value) when is_integer(value) and value > @longest,
    do: "at most #{@longest} milliseconds, or :infinity"

  defp problem(:timeout, value) do
    unless is_integer(value) and value > 0,
      do: "a positive number of milliseconds or :infinity"
  end

  defp problem(:bytes, :infinity), do: nil

  defp problem(:bytes, value),
    do: unless(is_integer(value) and value > 0, do: "a positive number of bytes or :infinity")

  defp problem(:boolean, value), do: unless(is_boolean(value), do: "true or false")
  defp problem(:keyword, value), do: unless(Keyword.keyword?(value), do: "a keyword list")

  defp problem({:in, allowed}, value),
    do: unless(value in allowed, do: "one of #{Enum.map_join(allowed, ", ", &inspect/1)}")

  defp problem(:name, {:global, _term}), do: nil
  defp problem(:name, {:via, module, _term}) when is_atom(module), do: nil

  defp problem(:name, value) do
    unless is_atom(value) and value not in [nil, true, false],
      do: "an atom, {:global, term} or {:via, module, term}"
  end

  defp problem(:executable, value),
    do: unless(string?(value), do: "a path or the name of a program")

  defp problem(:directory, value),
    do: unless(string?(value) and File.dir?(value), do: "a directory that exists")

  defp problem(:strings, value),
    do: unless(is_list(value) and Enum.all?(value, &string?/1), do: "a list of strings")

  defp problem(:env, value) do
    unless (is_list(value) or (is_map(value) and not is_struct(value))) and
             Enum.all?(value, &variable?/1),
           do: "a map or list of {name, value}, both strings, the value nil to remove a variable"
  end

  defp problem(:backoff, value) do
    case value do
      {first, longest}
      when is_integer(first) and is_integer(longest) and first > 0 and longest >= first ->
        nil

      _ ->
        "{first, longest} in milliseconds, both positive, the second not the smaller"
    end
  end

  # A zero byte would end the string for the operating system, and a port's environment is text.
  defp string?(value) do
    is_binary(value) and value != "" and String.valid?(value) and
      not String.contains?(value, <<0>>)
  end

  defp variable?({name, value}) do
    string?(name) and not String.contains?(name, "=") and
      (value in [nil, ""] or string?(value))
  end

  defp variable?(_other), do: false
end
