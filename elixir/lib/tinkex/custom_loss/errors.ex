defmodule Tinkex.CustomLoss.TermError do
  @moduledoc """
  A term - the base loss or a regularizer - raised, or returned what no term may return.

    * `:term` - its name, `"base_loss"` for the base loss
    * `:type` - the Python type of what it raised, or nil
    * `:reason` - Python's message
    * `:traceback` - Python's traceback as text, or nil
    * `:datum`, `:token` - where the gradient, or else the logprobs, are first not finite, or nil
    * `:timed_out` - whether the term outlived its own `timeout`

  Only this call is affected: the worker goes on.
  """
  defexception [:term, :type, :reason, :traceback, :datum, :token, timed_out: false]

  @type t :: %__MODULE__{
          term: String.t() | nil,
          type: String.t() | nil,
          reason: String.t(),
          traceback: String.t() | nil,
          datum: non_neg_integer() | nil,
          token: [non_neg_integer()] | nil,
          timed_out: boolean()
        }

  @impl true
  def message(%{reason: reason, traceback: nil}), do: reason
  def message(%{reason: reason, traceback: traceback}), do: "#{reason}\n\n#{traceback}"
end

defmodule Tinkex.CustomLoss.RequestError do
  @moduledoc """
  The request cannot be carried out as written; `:reason` says what is allowed.

  `:path` is where in the request, such as `"regularizers[1].params"`, or nil. What can be told
  without a pool raises `ArgumentError` instead.
  """
  defexception [:reason, :path]

  @type t :: %__MODULE__{reason: String.t(), path: String.t() | nil}

  @impl true
  def message(%{reason: reason, path: nil}), do: reason

  def message(%{reason: reason, path: path}),
    do: if(String.contains?(reason, path), do: reason, else: "#{reason} (at `#{path}`)")
end

defmodule Tinkex.CustomLoss.TimeoutError do
  @moduledoc """
  The call's deadline passed.

  `:timeout` is in milliseconds. `:stage` says what it was spent on: `:queued`, no worker had room;
  `:computing`, a worker had the request, or was being sent it; `:draining`, `:reloading`, the pool
  was not done with that.
  """
  defexception [:timeout, :stage]

  @type t :: %__MODULE__{
          timeout: timeout(),
          stage: :queued | :computing | :draining | :reloading
        }

  @impl true
  def message(%{timeout: timeout, stage: :queued}) do
    "no worker had room for the request within #{timeout} ms: all were starting or busy. " <>
      "Raise :timeout, start more :workers, or see Tinkex.CustomLoss.info/1 for what they do"
  end

  def message(%{timeout: timeout, stage: :computing}) do
    "the loss was not computed within #{timeout} ms and was cancelled. " <>
      "Raise :timeout, or give the slow regularizer a :timeout of its own to learn which it is"
  end

  def message(%{timeout: timeout, stage: :draining}) do
    "the pool still had requests after #{timeout} ms. It goes on with them and takes no others; " <>
      "drain it once more to wait on"
  end

  def message(%{timeout: timeout, stage: :reloading}) do
    "not all workers were started anew within #{timeout} ms. The pool goes on doing that; " <>
      "see Tinkex.CustomLoss.info/1 for how far it is"
  end
end

defmodule Tinkex.CustomLoss.WorkerError do
  @moduledoc """
  A worker could not serve the request: it never started, died, or broke the protocol.

  `:reason` is one of

    * `:not_running` - nothing runs under the name `:worker`
    * `{:not_started, sentence}` - Python does not start; the sentence says what to run
    * `{:lost, reasons}` - the request was on several workers that died, usually two, and alone on the
      last one; retrying once more would only kill the next one
    * `{:stopped, reason}` - the pool went away during the call
    * `:draining` - the pool takes no more requests, see `Tinkex.CustomLoss.drain/2`
    * `{:protocol, sentence}` - what came is no message: a term wrote to the port, or a bug
    * `{:internal, sentence}` - a bug in one of the two sides, to be reported
    * `{:node, node, reason}` - the node of the pool cannot be reached

  or, for a worker that died (see the telemetry event `[:tinkex_custom_loss, :worker, :down]`),
  `{:exited, status}`, `{:port, reason}`, `:unresponsive` or `:overdue`; or, for one that was to be
  started anew, `:reloaded` or `{:max_rss, bytes}`.
  """
  defexception [:reason, :worker]

  @type t :: %__MODULE__{reason: term(), worker: term()}

  @doc false
  # Whether a worker that ended for this reason was meant to.
  def planned?(reason), do: reason == :reloaded or match?({:max_rss, _bytes}, reason)

  @impl true
  def message(%{reason: reason, worker: worker}), do: describe(reason, worker)

  defp describe(:not_running, server) do
    "no Tinkex.CustomLoss runs as #{inspect(server)}; start it in your supervision tree: " <>
      "{Tinkex.CustomLoss, name: #{inspect(server)}}"
  end

  defp describe({:not_started, sentence}, _worker), do: sentence

  defp describe({:lost, reasons}, _worker) do
    ways = Enum.map_join(reasons, "; ", &describe(&1, nil))
    all = if match?([_, _], reasons), do: "both", else: "all"

    "the request was given up after #{all} workers that it was on ended (#{ways}). " <>
      "A term probably ends its process: look for a crash in native code, os._exit, or memory " <>
      "running out, and try the terms one by one"
  end

  defp describe({:stopped, reason}, _worker),
    do: "the pool stopped during the call: #{Exception.format_exit(reason)}"

  defp describe(:draining, _worker),
    do: "the pool is being drained: it finishes what it has and takes no other requests"

  defp describe({:protocol, sentence}, _worker) do
    "#{sentence}. Something in the Python process may have written to the port's descriptors; " <>
      "if no term does, please report this"
  end

  defp describe({:internal, sentence}, _worker), do: "#{sentence}; please report this"

  defp describe({:node, node, reason}, _worker),
    do: "the node #{node}, where the pool runs, did not answer: #{inspect(reason)}"

  # An exit status above 128 is that of a signal.
  defp describe({:exited, 139}, _), do: "its process ended with a segmentation fault (signal 11)"
  defp describe({:exited, 134}, _), do: "its process aborted (signal 6)"

  defp describe({:exited, 137}, _),
    do: "its process was killed (signal 9), by the operating system if memory ran out"

  defp describe({:exited, status}, _) when status > 128,
    do: "its process was ended by signal #{status - 128}"

  defp describe({:exited, status}, _), do: "its process exited with status #{status}"
  defp describe({:port, reason}, _), do: "its pipe broke: #{inspect(reason)}"

  defp describe(:unresponsive, _),
    do: "it did not answer pings, so it was killed"

  defp describe(:reloaded, _), do: "it was started anew by Tinkex.CustomLoss.reload/2"

  defp describe({:max_rss, bytes}, _),
    do: "it had #{bytes} bytes of memory, more than :max_rss allows, so it was started anew"

  defp describe(:replaced, _), do: "its Erlang process was replaced"

  defp describe(:overdue, _),
    do: "it went on with a cancelled request beyond the grace period, so it was killed"

  defp describe(reason, _), do: Exception.format_exit(reason)
end

defmodule Tinkex.CustomLoss.OverloadedError do
  @moduledoc """
  All workers were full, and so was the queue: back-pressure. Nothing was sent.

  `:in_flight` and `:queued` count requests.
  """
  defexception [:in_flight, :queued]

  @type t :: %__MODULE__{in_flight: non_neg_integer(), queued: non_neg_integer()}

  @impl true
  def message(%{in_flight: in_flight, queued: queued}) do
    "#{in_flight} requests are with the workers and #{queued} wait, as many as :max_queue allows. " <>
      "Call from fewer processes, start more :workers, or raise :max_queue"
  end
end
