defmodule Tinkex.CustomLoss.Wire.MessagePack do
  @moduledoc """
  A complete [MessagePack](https://github.com/msgpack/msgpack/blob/master/spec.md) codec.

  | Elixir | MessagePack | back in Elixir |
  |---|---|---|
  | `nil`, `true`, `false` | nil, bool | the same |
  | integer, -2^63 to 2^64 - 1 | shortest int | integer |
  | float; `:nan`, `:infinity`, `:neg_infinity` | float 64 | the same (float 32 is read, too) |
  | `String.t()` | str | binary, a copy |
  | `{:bin, iodata}` | bin | binary, a part of the frame |
  | list | array | list |
  | map with string or atom keys | map, keys ascending | map with string keys |
  | `Tinkex.CustomLoss.Wire.MessagePack.Ext` | ext | the same |
  | `Tinkex.CustomLoss.Wire.MessagePack.Timestamp` | ext -1 | the same |

  Encoding yields the canonical form of docs/protocol.md: equal terms give equal bytes. The result
  is iodata that refers to the payload of a `{:bin, iodata}`; nothing large is copied.

  Decoding makes no atom from the wire, and checks every declared length against the bytes that are
  left before it builds anything. A bin is a part of the frame and keeps the whole frame alive;
  strings are copied out of it, so that keeping a metric's name does not.

  Both directions refuse the same things, so that what was encoded can be decoded: more than 64
  levels, more than 1,048,576 values, a map whose keys are not all different strings, a str that is
  not UTF-8 (bytes belong in a bin). Any atom may be a key and becomes a string; as values, only the
  six of the table may.
  """

  defmodule Ext do
    @moduledoc "An extension value: an application's `type` (-128 to 127) and its bytes."
    @enforce_keys [:type, :data]
    defstruct [:type, :data]
    @type t :: %__MODULE__{type: -128..127, data: binary()}
  end

  defmodule Timestamp do
    @moduledoc "The predefined extension -1: seconds since 1970-01-01T00:00:00Z, and nanoseconds."
    @enforce_keys [:seconds]
    defstruct [:seconds, nanoseconds: 0]
    @type t :: %__MODULE__{seconds: integer(), nanoseconds: 0..999_999_999}
  end

  defmodule DecodeError do
    @moduledoc "A frame that is not one MessagePack value. `offset` is the byte where it stops being one."
    defexception [:reason, :offset]
    @type t :: %__MODULE__{reason: String.t(), offset: non_neg_integer()}

    @impl true
    def message(%{reason: reason, offset: offset}),
      do: "not MessagePack: #{reason} (at byte #{offset})"
  end

  alias __MODULE__.{Decoder, Encoder}

  @type key :: String.t() | atom()
  @type encodable ::
          nil
          | boolean()
          | number()
          | :nan
          | :infinity
          | :neg_infinity
          | String.t()
          | {:bin, iodata()}
          | [encodable()]
          | %{key() => encodable()}
          | Ext.t()
          | Timestamp.t()

  @doc """
  Encodes a term in canonical form.

  Raises `ArgumentError` with the path to whatever MessagePack, or this codec, has no form for.

      iex> IO.iodata_to_binary(Tinkex.CustomLoss.Wire.MessagePack.encode(%{ok: [1, -1, "é"]}))
      <<0x81, 0xA2, "ok", 0x93, 1, 0xFF, 0xA2, "é">>
  """
  @spec encode(encodable()) :: iodata()
  def encode(term), do: Encoder.encode(term)

  @doc false
  # A path is kept innermost first: ["weight", 1, "regularizers"] is `regularizers[1].weight`.
  @spec format_path([key() | non_neg_integer()]) :: String.t()
  def format_path(path) do
    path
    |> Enum.reverse()
    |> Enum.map_join(fn
      index when is_integer(index) -> "[#{index}]"
      key -> ".#{key}"
    end)
    |> String.trim_leading(".")
  end

  @doc """
  Decodes a frame that holds exactly one value.

      iex> Tinkex.CustomLoss.Wire.MessagePack.decode(<<0x92, 1, 0xCB, 0x7FF0000000000000::64>>)
      {:ok, [1, :infinity]}

      iex> {:error, error} = Tinkex.CustomLoss.Wire.MessagePack.decode(<<0x92, 1>>)
      iex> Exception.message(error)
      "not MessagePack: an array of 2 items, but bytes left: 1 (at byte 1)"
  """
  @spec decode(binary()) :: {:ok, term()} | {:error, DecodeError.t()}
  def decode(frame) when is_binary(frame) do
    with {:error, reason, rest} <- Decoder.decode(frame) do
      {:error, %DecodeError{reason: reason, offset: byte_size(frame) - byte_size(rest)}}
    end
  end
end
