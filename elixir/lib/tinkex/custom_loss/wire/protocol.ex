defmodule Tinkex.CustomLoss.Wire.Protocol do
  @moduledoc """
  The messages of docs/protocol.md, typed: what the host sends, and what a worker may answer.

  Encoding takes what the public module has validated and returns the iodata of one frame, whose
  tensors are referred to and not copied. Decoding checks every key that the protocol lists, ignores
  those that it does not, and returns maps with atom keys for what the protocol names and string
  keys for what users name. A tensor is a `Tinkex.CustomLoss.Wire.Batch` that is a part of the frame.
  """

  alias Tinkex.CustomLoss.Wire.{Batch, Frame, MessagePack}

  @version 3

  @doc "The version of the protocol that this module speaks."
  @spec version() :: pos_integer()
  def version, do: @version

  @type id :: non_neg_integer()

  @type compute :: %{
          required(:id) => id(),
          required(:logprobs) => Batch.t(),
          optional(:data) => map() | nil,
          optional(:base_loss) => map() | nil,
          optional(:regularizers) => [map()],
          optional(:step) => non_neg_integer() | nil,
          optional(:gradients) => boolean(),
          optional(:totals) => map() | nil
        }

  @doc """
  A `compute` request.

  `data` is what `Tinkex.CustomLoss.Wire.Data.to_wire/2` returns. The base loss and the regularizers are
  maps or structs with the keys of the protocol, as atoms or strings; an option that is nil is left
  out, one that is an atom (`on_error: :skip`) goes as a string.

  Raises `ArgumentError` for a parameter that MessagePack has no form for.
  """
  @spec encode_compute(compute()) :: iodata()
  def encode_compute(%{id: id, logprobs: %Batch{} = logprobs} = request) do
    message = %{
      "op" => "compute",
      "id" => id,
      "logprobs" => logprobs,
      "data" => Map.get(request, :data),
      "base_loss" => term(Map.get(request, :base_loss)),
      "regularizers" => request |> Map.get(:regularizers, []) |> Enum.map(&term/1),
      "step" => Map.get(request, :step),
      "gradients" => Map.get(request, :gradients, true)
    }

    Frame.encode(with_totals(message, request))
  end

  @doc """
  Asks for the totals of a step; with `:totals`, whether these datums can be a part of one.

  The keys are those of `encode_compute/1`, of which it needs no logprobs.
  """
  @spec encode_totals(map()) :: iodata()
  def encode_totals(%{id: id, data: data} = request) do
    message = %{
      "op" => "totals",
      "id" => id,
      "data" => data,
      "base_loss" => term(Map.get(request, :base_loss)),
      "regularizers" => request |> Map.get(:regularizers, []) |> Enum.map(&term/1)
    }

    Frame.encode(with_totals(message, request))
  end

  defp with_totals(message, %{totals: %{} = totals}), do: Map.put(message, "totals", totals)
  defp with_totals(message, _whole), do: message

  @doc "Withdraws a request; the answer is the error `:cancelled` of that request."
  @spec encode_cancel(id()) :: iodata()
  def encode_cancel(id), do: MessagePack.encode(%{"op" => "cancel", "id" => id})

  @doc "Asks for the descriptors of the terms that may be named."
  @spec encode_terms(id()) :: iodata()
  def encode_terms(id), do: MessagePack.encode(%{"op" => "terms", "id" => id})

  @doc "Asks for a sign of life, which a worker gives even while a term computes."
  @spec encode_ping(id()) :: iodata()
  def encode_ping(id), do: MessagePack.encode(%{"op" => "ping", "id" => id})

  @doc false
  # A base loss or regularizer, as a map of the wire.
  def term(nil), do: nil
  def term(%_{} = term), do: term |> Map.from_struct() |> term()

  def term(term),
    do: for({key, value} <- term, value != nil, into: %{}, do: {key, option(value)})

  defp option(value) when is_atom(value) and not is_boolean(value), do: Atom.to_string(value)
  defp option(value), do: value

  # What a worker may say. A record is a map whose listed keys become atoms; a part is a map, kept as
  # it came, of which some keys are checked. A nilable key may be absent.

  @param {:record, name: :string, required: :boolean, default: :any, type: :string}

  @term {:record,
         name: :string, kind: :string, async: :boolean, doc: :string, params: {:list, @param}}

  @ready {:record,
          protocol: :integer,
          package: :string,
          python: :string,
          torch: :string,
          tinker: :string,
          pid: :integer,
          rss: {:nilable, :integer},
          max_frame: :integer,
          max_in_flight: :integer,
          shared_memory: {:nilable, {:record, descriptors: {:list, :integer}, token: :string}},
          terms: {:list, @term}}

  @record {:part,
           loss_total: :float,
           regularizer_total: :float,
           base_loss: {:nilable, {:part, value: {:nilable, :float}}},
           regularizers:
             {:map, {:part, value: {:nilable, :float}, weight: :float, contribution: :float}}}

  @computed {:record, loss_total: :float, gradients: {:nilable, :batch}, record: @record}
  @counted {:record, totals: {:map, {:part, scope: :string, sequences: :integer}}}
  @listed {:record, terms: {:list, @term}}
  @alive {:record, in_flight: :integer, uptime: :float, rss: :integer}

  @kinds [:request, :term, :deadline, :cancelled, :protocol, :startup, :internal]
  @failure {:record,
            error:
              {:record,
               kind: {:one_of, @kinds},
               message: :string,
               type: {:nilable, :string},
               term: {:nilable, :string},
               traceback: {:nilable, :string},
               path: {:nilable, :string},
               datum: {:nilable, :integer},
               token: {:nilable, {:list, :integer}}}}

  @levels [:debug, :info, :warning, :error, :critical]
  @log {:record,
        level: {:one_of, @levels},
        logger: :string,
        message: :string,
        term: {:nilable, :string},
        id: {:nilable, :integer}}

  @type kind :: :request | :term | :deadline | :cancelled | :protocol | :startup | :internal

  @type error :: %{
          kind: kind(),
          message: String.t(),
          type: String.t() | nil,
          term: String.t() | nil,
          traceback: String.t() | nil,
          path: String.t() | nil,
          datum: non_neg_integer() | nil,
          token: [non_neg_integer()] | nil
        }

  @doc """
  What a frame from a worker says.

    * `{:ready, map}` - keys as in the protocol. Of another version than `version/0` only `:protocol`
      is there: no more is known about it than that.
    * `{:result, id, map}` - with the keys of the answer to `compute` (`:loss_total`, `:gradients`,
      `:telemetry`, the latter with string keys), `totals` (`:totals`, with string keys), `terms` (`:terms`) or `ping` (`:in_flight`,
      `:uptime`, `:rss`)
    * `{:error, id | nil, error}` - a map with an atom as its `:kind`. A reply that has an id but is
      not what the protocol says is one, too, of kind `:protocol`: whoever waits is told.
    * `{:log, map}` - `:level` is one of Logger's
    * `{:invalid, reason}` - no such message, and nobody who waits for it

  A sentence about a message ends in its path:

      iex> frame = Tinkex.CustomLoss.Wire.MessagePack.encode(%{op: "result", id: 7, loss_total: "2.5"})
      iex> {:error, 7, error} = Tinkex.CustomLoss.Wire.Protocol.decode(IO.iodata_to_binary(frame))
      iex> error.message
      "the worker's result is malformed: expected a float at `loss_total`, got a string"

  `read` is that of `Frame.decode/2`, for payloads in shared memory.
  """
  @spec decode(binary(), (term(), Frame.place() -> {:ok, binary()} | {:error, String.t()})) ::
          {:ready, map()}
          | {:result, id(), map()}
          | {:error, id() | nil, error()}
          | {:log, map()}
          | {:invalid, String.t()}
  def decode(frame, read \\ &Frame.nowhere/2) do
    case Frame.decode(frame, read) do
      {:ok, %{} = message} -> message(message)
      {:ok, other} -> {:invalid, "the worker's message is #{kind_of(other)}, not a map"}
      {:error, error} -> {:invalid, "the worker's message is #{Exception.message(error)}"}
    end
  end

  defp message(%{"op" => "ready", "protocol" => version})
       when is_integer(version) and version != @version,
       do: {:ready, %{protocol: version}}

  defp message(%{"op" => "ready"} = message) do
    with {:ok, ready} <- check(message, @ready), do: {:ready, ready}
  end

  defp message(%{"op" => "result"} = message) do
    with {:ok, %{id: id}} <- check(message, {:record, id: :integer}) do
      case check(message, result_type(message)) do
        {:ok, result} -> {:result, id, result}
        {:invalid, reason} -> {:error, id, malformed(reason)}
      end
    end
  end

  defp message(%{"op" => "error"} = message) do
    with {:ok, %{id: id}} <- check(message, {:record, id: {:nilable, :integer}}) do
      case check(message, @failure) do
        {:ok, %{error: error}} -> {:error, id, error}
        {:invalid, reason} when is_nil(id) -> {:invalid, reason}
        {:invalid, reason} -> {:error, id, malformed(reason)}
      end
    end
  end

  defp message(%{"op" => "log"} = message) do
    with {:ok, log} <- check(message, @log), do: {:log, log}
  end

  defp message(%{"op" => op}),
    do: {:invalid, "the worker's message has the op #{inspect(op)}, which the protocol lacks"}

  defp message(_message), do: {:invalid, "the worker's message has no op"}

  defp result_type(%{"totals" => _}), do: @counted
  defp result_type(%{"terms" => _}), do: @listed
  defp result_type(%{"in_flight" => _}), do: @alive
  defp result_type(_message), do: @computed

  defp malformed(reason) do
    %{
      kind: :protocol,
      message: reason,
      type: nil,
      term: nil,
      traceback: nil,
      path: nil,
      datum: nil,
      token: nil
    }
  end

  defp check(message, type) do
    {:ok, typed(type, message, [])}
  catch
    {:unexpected, sentence} ->
      {:invalid, "the worker's #{message["op"]} is malformed: #{sentence}"}
  end

  defp typed(:any, value, _path), do: value
  defp typed(:string, value, _path) when is_binary(value), do: value
  defp typed(:integer, value, _path) when is_integer(value), do: value
  defp typed(:boolean, value, _path) when is_boolean(value), do: value
  defp typed(:float, value, _path) when is_float(value), do: value
  # Writers in languages with one kind of number send 2.0 as 2.
  defp typed(:float, value, _path) when is_integer(value), do: value * 1.0
  defp typed(:float, value, _path) when value in [:nan, :infinity, :neg_infinity], do: value

  defp typed(:batch, value, path) do
    case Batch.from_wire(value) do
      {:ok, batch} -> batch
      {:error, inner, sentence} -> unexpected("#{at(inner ++ path)} #{sentence}")
    end
  end

  defp typed({:nilable, _type}, nil, _path), do: nil
  defp typed({:nilable, type}, value, path), do: typed(type, value, path)

  defp typed({:one_of, atoms} = type, value, path) when is_binary(value) do
    Enum.find(atoms, &(Atom.to_string(&1) == value)) || expected(type, inspect(value), path)
  end

  defp typed({:list, type}, list, path) when is_list(list),
    do: Enum.with_index(list, &typed(type, &1, [&2 | path]))

  defp typed({:map, type}, %{} = map, path) when not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, typed(type, value, [key | path])} end)

  defp typed({:record, keys}, %{} = map, path) when not is_struct(map),
    do: Map.new(keys, fn {key, type} -> {key, fetch(map, Atom.to_string(key), type, path)} end)

  defp typed({:part, keys}, %{} = map, path) when not is_struct(map) do
    Enum.reduce(keys, map, fn {key, type}, map ->
      key = Atom.to_string(key)
      Map.put(map, key, fetch(map, key, type, path))
    end)
  end

  defp typed(type, value, path), do: expected(type, kind_of(value), path)

  defp fetch(map, key, type, path) do
    case map do
      %{^key => value} -> typed(type, value, [key | path])
      %{} when elem(type, 0) == :nilable -> nil
      %{} -> expected(type, "nothing", [key | path])
    end
  end

  @spec expected(term(), String.t(), [String.t() | non_neg_integer()]) :: no_return()
  defp expected(type, got, path),
    do: unexpected("expected #{article(type)} at #{at(path)}, got #{got}")

  @spec unexpected(String.t()) :: no_return()
  defp unexpected(sentence), do: throw({:unexpected, sentence})

  defp at([]), do: "the top"
  defp at(path), do: "`#{MessagePack.format_path(path)}`"

  defp article({:nilable, type}), do: "#{article(type)} or nil"
  defp article({:one_of, atoms}), do: "one of #{Enum.join(atoms, ", ")}"
  defp article({:list, _}), do: "an array"
  defp article({type, _}) when type in [:map, :record, :part], do: "a map"
  defp article(:integer), do: "an integer"
  defp article(type), do: "a #{type}"

  defp kind_of(nil), do: "nil"
  defp kind_of(value) when is_binary(value), do: "a string"
  defp kind_of(value) when is_boolean(value), do: "a boolean"
  defp kind_of(value) when is_integer(value), do: "an integer"
  defp kind_of(value) when is_float(value) or is_atom(value), do: "a float"
  defp kind_of(value) when is_list(value), do: "an array"
  defp kind_of(value) when is_struct(value), do: "an ext"
  defp kind_of(value) when is_map(value), do: "a map"
end
