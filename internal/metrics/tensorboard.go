package metrics

import (
	"encoding/binary"
	"hash/crc32"
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// TensorBoard's event files are TFRecords (https://www.tensorflow.org/tutorials/load_data/tfrecord), one after the other:
//
//	uint64 length | uint32 masked CRC of the length | data | uint32 masked CRC of the data     all little endian
//
// The CRC is CRC-32C, masked as tensorflow/core/lib/hash/crc32c.h does, since a CRC of data with CRCs in it is a weak one.
// Data is a message Event (tensorflow/core/util/event.proto); a plot's point is a Summary in it
// (tensorflow/core/framework/summary.proto) whose simple_value is a 32-bit float: what every reader of such files knows.
// The exact values are in the CSV.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func maskedCRC(b []byte) uint32 {
	c := crc32.Checksum(b, castagnoli)
	return (c>>15 | c<<17) + 0xa282ead8
}

// appendTFRecord frames data.
func appendTFRecord(b, data []byte) []byte {
	n := len(b)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	b = binary.LittleEndian.AppendUint32(b, maskedCRC(b[n:]))
	b = append(b, data...)
	return binary.LittleEndian.AppendUint32(b, maskedCRC(data))
}

// Numbers of fields, by message.
const (
	eventWallTime    = 1 // double, seconds
	eventStep        = 2 // int64
	eventFileVersion = 3 // string
	eventSummary     = 5 // Summary

	summaryValue = 1 // repeated Summary.Value

	valueTag      = 1
	valueSimple   = 2 // float
	valueTensor   = 8 // TensorProto
	valueMetadata = 9 // SummaryMetadata

	metadataPlugin = 1 // SummaryMetadata.PluginData
	pluginName     = 1

	tensorDType   = 1 // enum
	tensorShape   = 2 // TensorShapeProto
	tensorStrings = 8 // repeated bytes
	shapeDim      = 2 // repeated Dim
	dimSize       = 1
	dtString      = 7
)

func appendMessage(b []byte, field protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
}

func appendInt(b []byte, field protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}

func eventHead(at time.Time, step int64) []byte {
	// Seconds and the rest apart: as nanoseconds since 1970 the first and last years overflow.
	wall := float64(at.Unix()) + float64(at.Nanosecond())/1e9
	b := protowire.AppendFixed64(protowire.AppendTag(nil, eventWallTime, protowire.Fixed64Type), math.Float64bits(wall))
	if step != 0 {
		b = appendInt(b, eventStep, step)
	}
	return b
}

// versionEvent is the first event of each file. Version 2 keeps points whose step goes back; older ones drop what they
// take for the remains of a restart.
func versionEvent(at time.Time) []byte {
	return appendMessage(eventHead(at, 0), eventFileVersion, []byte("brain.Event:2"))
}

// scalarEvent is a point of a plot.
func scalarEvent(at time.Time, step int64, tag string, v float64) []byte {
	val := appendMessage(nil, valueTag, []byte(tag))
	val = protowire.AppendFixed32(protowire.AppendTag(val, valueSimple, protowire.Fixed32Type), math.Float32bits(float32(v)))
	return appendMessage(eventHead(at, step), eventSummary, appendMessage(nil, summaryValue, val))
}

// textEvent is a text for TensorBoard's text plugin: a tensor of one string.
func textEvent(at time.Time, tag, text string) []byte {
	shape := appendMessage(nil, shapeDim, appendInt(nil, dimSize, 1))
	tensor := appendInt(nil, tensorDType, dtString)
	tensor = appendMessage(tensor, tensorShape, shape)
	tensor = appendMessage(tensor, tensorStrings, []byte(text))
	val := appendMessage(nil, valueTag, []byte(tag))
	val = appendMessage(val, valueTensor, tensor)
	val = appendMessage(val, valueMetadata, appendMessage(nil, metadataPlugin, appendMessage(nil, pluginName, []byte("text"))))
	return appendMessage(eventHead(at, 0), eventSummary, appendMessage(nil, summaryValue, val))
}
